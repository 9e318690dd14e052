"""The ideas of FlashDecoding++ (arXiv:2311.01282), each switched off in turn in one loaded model, and each on alone.

Weights and KV cache are the same for all variants; what differs is the softmax of attention and the points where a
linear layer changes from one implementation to the next. Variants take turns at decoding the same sequences, a few
steps each, so that a busy moment of the machine falls on all; each round begins with another one, and the fastest
single step counts. The baseline takes part twice: what lies between its two figures is noise.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace

from headrace.bench.ablation_variants import BASELINE, VARIANTS, Variant
from headrace.bench.model import BATCH_CONTEXT_LEN, BenchSettings, ModelSpeed
from headrace.bench.rounds import RoundRunner
from headrace.config import DataflowChoice, EngineConfig, Softmax, SoftmaxScheme
from headrace.engine.engine import Engine
from headrace.engine.load import LoadedModel, load_model
from headrace.engine.local_executor import LocalExecutor
from headrace.engine.softmax import ForcedSoftmax, SwitchableAttention, force_asynchronized
from headrace.engine.tune import prepare_dataflow
from headrace.errors import ConfigError, KernelError
from headrace.kernels import Kernels, SoftmaxCounts, SoftmaxSpec
from headrace.kernels.tuning import Inflections, LinearShape
from headrace.models.model_folder import resolve_model_folder

WARM_UP_STEPS = 2
"""Of each turn, not timed: the first one after a change is recorded."""


class Switchboard:
    """Turns one loaded model from variant to variant."""

    def __init__(self, model: LoadedModel, attention: SwitchableAttention, asynchronized: ForcedSoftmax) -> None:
        assert model.kernels.dataflow is not None, "the loader has asked for it"
        assert isinstance(model.executor, LocalExecutor)
        self.model = model
        self.asynchronized = asynchronized
        self._attention, self._worker, self._dataflow = attention, model.executor.worker, model.kernels.dataflow
        self._measured = dict(self._dataflow.tuned)

    @property
    def obstacle(self) -> str | None:
        """What keeps steps of the variant that is set from being replayed, once some have run."""
        return self._worker.decode_step.obstacle

    @property
    def inflections(self) -> Mapping[LinearShape, Inflections]:
        """What was measured for the shapes of this model."""
        return {shape: self._measured[shape].inflections for shape in self.model.linear_weights.by_shape}

    def set(self, variant: Variant) -> None:
        self._dataflow.tuned = {
            shape: replace(tuned, inflections=variant.inflections(tuned, self._dataflow.default_inflections(shape)))
            for shape, tuned in self._measured.items()
        }
        others = (SoftmaxSpec(scheme=variant.softmax),) * self.model.config.num_hidden_layers
        is_asynchronized = variant.softmax is SoftmaxScheme.ASYNCHRONIZED
        self._attention.softmax = self.asynchronized.softmax if is_asynchronized else others
        self._worker.decode_step.forget()

    def counts(self) -> SoftmaxCounts:
        """Rows of all layers since the model was loaded."""
        counts = self._attention.counts()
        return SoftmaxCounts(
            num_rows=sum(count.num_rows for count in counts),
            num_recomputed_rows=sum(count.num_recomputed_rows for count in counts),
        )


def load_switchboard(config: EngineConfig) -> Switchboard:
    """Load a model that can be switched, and measure its linear layers where that has not been done.

    Raises:
        ConfigError: kernels that have nothing to switch.
        CheckpointError: the model cannot be loaded.
    """
    attentions: list[SwitchableAttention] = []

    def change(kernels: Kernels) -> Kernels:
        if kernels.dataflow is None or SoftmaxScheme.ASYNCHRONIZED not in kernels.softmax_schemes:
            raise ConfigError(
                "there is nothing to switch off: attention and linear layers have one implementation each in plain "
                "torch; `headrace info` says why there are no others"
            )
        attentions.append(SwitchableAttention(kernels))
        return replace(kernels, attention=attentions[0])

    config = replace(config, dataflow=DataflowChoice.DEFAULT, softmax=Softmax.SYNCHRONIZED)
    model = load_model(config, change_kernels=change)
    attentions[0].forget_caches()
    prepare_dataflow(
        model.kernels,
        model.linear_weights,
        DataflowChoice.MEASURED,
        model.plan.num_threads,
        show_progress=config.load.show_progress,
        min_weight_bytes=0,
    )
    asynchronized = force_asynchronized(
        resolve_model_folder(config.load.model, config.load.revision, config.load.show_progress),
        num_layers=model.config.num_hidden_layers,
        max_model_len=model.plan.max_model_len,
        cache_format=model.kv_cache_format,
    )
    return Switchboard(model, attentions[0], asynchronized)


def _check_alike(obstacles: Mapping[str | None, str]) -> None:
    if len(obstacles) > 1:
        [obstacle, label] = next(found for found in obstacles.items() if found[0] is not None)
        raise KernelError(f"steps with {label} are not replayed and others are, which would be compared: {obstacle}")


def measure_ablation(
    switchboard: Switchboard,
    settings: BenchSettings,
    on_start: Callable[[str], None],
) -> dict[str, ModelSpeed]:
    """The fastest decode step of every variant, by its key; `on_start` hears of each round before it begins.

    settings.decode_tokens: steps of a turn.

    Raises:
        KernelError: some variants can be replayed and others cannot, so that their times say nothing of the ideas.
    """
    runner = RoundRunner(Engine(switchboard.model), repeats_prompts=True)
    speeds = {variant.key: ModelSpeed() for variant in VARIANTS}
    obstacles: dict[str | None, str] = {}
    num_steps = len(VARIANTS) * (WARM_UP_STEPS + settings.decode_tokens)

    def fastest_step_s(num_seqs: int, context_len: int, name: str) -> dict[str, float]:
        best = dict.fromkeys(speeds, float("inf"))
        for i in range(settings.num_rounds):
            on_start(f"{name}, round {i + 1} of {settings.num_rounds}")
            first = i % len(VARIANTS)
            with runner.prefilled(num_seqs, context_len, num_steps):
                for variant in (*VARIANTS[first:], *VARIANTS[:first]):
                    switchboard.set(variant)
                    runner.fastest_step_s(WARM_UP_STEPS)
                    obstacles[switchboard.obstacle] = variant.label
                    _check_alike(obstacles)
                    best[variant.key] = min(best[variant.key], runner.fastest_step_s(settings.decode_tokens))
        return best

    for length in settings.context_lens:
        for key, step_s in fastest_step_s(1, length, f"context of {length}").items():
            speeds[key].decode_step_s[length] = step_s
    for size in settings.batch_sizes:
        for key, step_s in fastest_step_s(size, BATCH_CONTEXT_LEN, f"batch of {size}").items():
            speeds[key].batch_step_s[size] = step_s
    switchboard.set(BASELINE)
    return speeds
