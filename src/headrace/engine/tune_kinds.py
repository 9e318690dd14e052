"""All that `headrace tune` measures of a loaded model, one kind of measurement after the other."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from headrace.engine.load import LoadedModel
from headrace.engine.tune import FULL_ROWS, measure_shapes, until_interrupted
from headrace.engine.tune_attention import attention_shape, contexts_of, measure_attention
from headrace.engine.tune_mixture import measure_mixture
from headrace.engine.tune_prefill import measure_prefill, prefill_steps
from headrace.kernels.attention_tuning import ATTENTION
from headrace.kernels.mixture_tuning import MIXTURE
from headrace.kernels.prefill_tuning import PREFILL
from headrace.kernels.tuning import LINEAR
from headrace.kernels.tuning_cache import Section

K = TypeVar("K")
V = TypeVar("V")

_ATTENTION_ROUNDS = 8
"""For each round of linear layers: a call is so short that noise is large beside it."""


@dataclass(frozen=True, kw_only=True)
class Kind(Generic[K, V]):
    """A kind of measurement. what: it is of, for people; num_results: that it has, unless it is interrupted."""

    section: Section[K, V]
    what: str
    num_results: int
    results: Callable[[], Iterable[tuple[K, V]]]

    def measure(self) -> dict[K, V]:
        """Until Ctrl-C, or the end."""
        return until_interrupted(self.results())


def kinds_of(model: LoadedModel, num_rounds: int, *, show_progress: bool) -> Iterator[Kind[Any, Any]]:
    """Those that have a choice on this machine."""
    kernels, linear, mixtures = model.kernels, model.linear_weights, model.mixtures
    heads = attention_shape(model.shape, model.kv_cache_format)
    yield Kind(
        section=LINEAR,
        what="linear layers",
        num_results=len(linear.by_shape),
        results=lambda: measure_shapes(
            kernels,
            linear,
            linear.by_shape,
            rows=FULL_ROWS,
            rounds=num_rounds,
            show_progress=show_progress,
            compares_tiles=True,
        ),
    )
    yield _single(
        ATTENTION,
        "attention",
        heads,
        lambda: measure_attention(
            kernels,
            heads,
            contexts=contexts_of(model.plan.max_model_len),
            num_threads=model.plan.num_threads,
            num_rounds=_ATTENTION_ROUNDS * num_rounds,
            show_progress=show_progress,
        ),
    )
    steps = prefill_steps(kernels, heads, model.plan.max_model_len)
    if steps:
        yield _single(
            PREFILL,
            "prompts' attention",
            heads,
            lambda: measure_prefill(kernels, heads, steps, num_rounds=num_rounds, show_progress=show_progress),
        )
    if mixtures is not None and kernels.has_expert_tiles:
        yield _single(
            MIXTURE,
            "the mixture of experts",
            mixtures.shape,
            lambda: measure_mixture(kernels, mixtures, num_rounds=num_rounds, show_progress=show_progress),
        )


def _single(section: Section[K, V], what: str, key: K, measure: Callable[[], V]) -> Kind[K, V]:
    def results() -> Iterator[tuple[K, V]]:
        yield key, measure()

    return Kind(section=section, what=what, num_results=1, results=results)
