"""Measures the attention of prompts: this project's kernel and the library's, over chunks and their contexts."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import date

import torch

from headrace.config import KvCacheFormat, SoftmaxScheme
from headrace.engine.tune import measuring_progress
from headrace.engine.tune_contexts import Contexts
from headrace.kernels import Kernels
from headrace.kernels.attention_tuning import AttentionShape
from headrace.kernels.dataflow import Dataflow
from headrace.kernels.prefill_tuning import PrefillArm, PrefillStep, TunedPrefill
from headrace.kernels.timing import best_of_rounds, timer_of

CHUNKS = (128, 256, 512, 1024, 2048, 4096)
CACHED = (0, 4096)
"""Tokens of a context before the chunk."""

_FORCED = {PrefillArm.KERNEL: None, PrefillArm.LIBRARY: 0}


def prefill_steps(kernels: Kernels, shape: AttentionShape, max_model_len: int) -> list[PrefillStep]:
    """Those that the model can have and the library can take; none where there is no choice."""
    find = kernels.prefill_library_obstacle
    steps = [PrefillStep(num_tokens=n, context_len=n + cached) for cached in CACHED for n in CHUNKS]
    dtype = torch.float32 if shape.cache_format is KvCacheFormat.FLOAT32 else torch.bfloat16
    sizes = {"num_kv_heads": shape.num_kv_heads, "head_dim": shape.head_dim, "num_seqs": 1}
    return [
        step
        for step in steps
        if find is not None
        and step.context_len <= max_model_len
        and find(dtype=dtype, max_context_len=step.context_len, **sizes) is None
    ]


def measure_prefill(
    kernels: Kernels,
    shape: AttentionShape,
    steps: Sequence[PrefillStep],
    *,
    num_rounds: int,
    show_progress: bool = False,
) -> TunedPrefill:
    """Time both for each step."""
    times: dict[PrefillArm, dict[PrefillStep, float]] = {arm: {} for arm in PrefillArm}
    with measuring_progress("measuring prompts' attention (Ctrl-C ends it)", len(steps), show_progress) as on_start:
        for step in steps:
            on_start(f"{step} tokens")
            for arm, seconds in best_of_rounds(_timers(kernels, shape, step), num_rounds).items():
                times[arm][step] = seconds
    return TunedPrefill(measured_on=date.today().isoformat(), times=times)


def _timers(kernels: Kernels, shape: AttentionShape, step: PrefillStep) -> dict[PrefillArm, Callable[[], float]]:
    dataflow = kernels.dataflow
    assert dataflow is not None, "there is nothing to choose"
    prepared = Contexts(kernels, shape, step.context_len, num_new=step.num_tokens)

    def call(arm: PrefillArm) -> Callable[[], object]:
        attend = prepared.attend(SoftmaxScheme.SYNCHRONIZED, step.context_len)

        def run() -> object:
            with forcing_prefill(dataflow, arm):
                return attend()

        return run

    return {arm: timer_of([call(arm)], device=kernels.device) for arm in PrefillArm}


@contextmanager
def forcing_prefill(dataflow: Dataflow, arm: PrefillArm) -> Iterator[None]:
    """Prompts' attention by one implementation, the library's where it can."""
    before = dataflow.prefill_library_from
    dataflow.prefill_library_from = _FORCED[arm]
    try:
        yield
    finally:
        dataflow.prefill_library_from = before
