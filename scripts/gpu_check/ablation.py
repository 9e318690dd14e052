"""The three ideas of FlashDecoding++, each switched off in turn in one loaded model, and all of them at once; see
`headrace.bench.ablation`."""

from __future__ import annotations

from collections.abc import Iterator

from headrace.bench.ablation import VARIANTS, Variant, load_switchboard, measure_ablation
from headrace.bench.model import BATCH_CONTEXT_LEN, BenchSettings
from headrace.config import CacheConfig, Device, Dtype, EngineConfig, LoadConfig, SchedulerConfig, SoftmaxScheme
from headrace.kernels.tuning import Inflections
from scripts.gpu_check.checkpoint import random_checkpoint
from scripts.gpu_check.context import Context
from scripts.gpu_check.figures import Figure

_STEPS_OF_A_TURN = 8


def _library_for_all(_measured: Inflections, _default: Inflections) -> Inflections:
    return Inflections(flat_gemm_from=1, gemm_from=1)


NONE = Variant(
    key="none",
    idea=None,
    label="none: log-sum-exp, cuBLAS",
    softmax=SoftmaxScheme.SYNCHRONIZED,
    inflections=_library_for_all,
)
"""A good engine without the three ideas: contexts are split all the same, and merged by log-sum-exp."""

_ALL_VARIANTS = (*VARIANTS, NONE)


def measure(context: Context) -> Iterator[Figure]:
    """Weights as they are stored; int8 and int4 take the same paths with less to read."""
    scale = context.scale
    switchboard = load_switchboard(
        EngineConfig(
            load=LoadConfig(
                model=str(random_checkpoint(context)), dtype=Dtype(str(context.dtype).removeprefix("torch."))
            ),
            cache=CacheConfig(kv_cache_bytes=scale.kv_cache_bytes),
            scheduler=SchedulerConfig(
                max_num_seqs=max([1, *scale.ablation_batches]),
                max_num_batched_tokens=max([*scale.ablation_contexts, 64]),
                max_model_len=max(scale.ablation_contexts) + 1024,
            ),
            device=Device.parse(str(context.device)),
            num_threads=scale.num_threads,
        )
    )
    settings = BenchSettings(
        decode_tokens=min(_STEPS_OF_A_TURN, scale.model_steps),
        context_lens=scale.ablation_contexts,
        batch_sizes=scale.ablation_batches,
        num_rounds=scale.num_rounds,
    )
    speeds = measure_ablation(switchboard, settings, lambda _: None, _ALL_VARIANTS)
    for variant in _ALL_VARIANTS:
        speed = speeds[variant.key]
        cases = {(1, n): seconds for n, seconds in speed.decode_step_s.items()}
        cases |= {(size, BATCH_CONTEXT_LEN): seconds for size, seconds in speed.batch_step_s.items()}
        for (batch, context_len), seconds in cases.items():
            labels: dict[str, str | int] = {
                "variant": variant.key,
                "label": variant.label,
                "batch": batch,
                "context": context_len,
            }
            yield Figure(group="ablation", labels=labels, seconds=seconds, num_tokens=batch)
