"""Measures the attention of prompts: this project's kernel and the library's, over chunks and their contexts."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import date

import torch

from headrace.config import DataflowChoice, KvCacheFormat, SoftmaxScheme
from headrace.engine.tune import measuring_progress
from headrace.engine.tune_attention import Contexts
from headrace.kernels import Kernels
from headrace.kernels.attention_tuning import AttentionShape
from headrace.kernels.dataflow import Dataflow
from headrace.kernels.prefill_tuning import PrefillArm, PrefillStep, TunedPrefill, load_prefill
from headrace.kernels.timing import TimedCalls, time_calls
from headrace.kernels.tuning import TuningCache

CHUNKS = (128, 256, 512, 1024, 2048, 4096)
CACHED = (0, 4096)
"""Tokens of a context before the chunk."""

_FORCED = {PrefillArm.KERNEL: None, PrefillArm.LIBRARY: 0}


def look_up_prefill(
    kernels: Kernels, choice: DataflowChoice, shape: AttentionShape, num_threads: int
) -> TunedPrefill | None:
    """What `headrace tune` kept for this machine; None if nothing, if there is no choice, or if the user chose not to
    have it used."""
    if kernels.tuning_key is None or kernels.library_prefill_obstacle is None:
        return None
    if choice is not DataflowChoice.MEASURED:
        return None
    return load_prefill(TuningCache(kernels.tuning_key(num_threads))).get(shape)


def prefill_steps(kernels: Kernels, shape: AttentionShape, max_model_len: int) -> list[PrefillStep]:
    """Those that the model can have and the library can take; none where there is no choice."""
    find = kernels.library_prefill_obstacle
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
    kernels: Kernels, shape: AttentionShape, *, max_model_len: int, num_rounds: int, show_progress: bool = False
) -> TunedPrefill | None:
    """Time both for each step, in turn, of which each one's best round counts; None where there is no choice, or if
    Ctrl-C ends it."""
    steps = prefill_steps(kernels, shape, max_model_len)
    if not steps:
        return None
    times: dict[PrefillArm, dict[PrefillStep, float]] = {arm: {} for arm in PrefillArm}
    try:
        with measuring_progress("measuring prompts' attention (Ctrl-C skips)", len(steps), show_progress) as on_start:
            for step in steps:
                on_start(f"{step} tokens")
                timed = _timed(kernels, shape, step)
                for arm in [*PrefillArm] * num_rounds:
                    seconds = timed[arm].best_s(min_calls=1, min_s=0.0)
                    times[arm][step] = min(seconds, times[arm].get(step, seconds))
    except KeyboardInterrupt:
        return None
    return TunedPrefill(measured_on=date.today().isoformat(), times=times)


def _timed(kernels: Kernels, shape: AttentionShape, step: PrefillStep) -> dict[PrefillArm, TimedCalls]:
    dataflow = kernels.dataflow
    assert dataflow is not None, "there is nothing to choose"
    prepared = Contexts(kernels, shape, step.context_len, step.num_tokens)

    def call(arm: PrefillArm) -> Callable[[], object]:
        attend = prepared.attend(SoftmaxScheme.SYNCHRONIZED, step.context_len)

        def run() -> object:
            with forcing_prefill(dataflow, arm):
                return attend()

        return run

    return {arm: time_calls([call(arm)], device=kernels.device) for arm in PrefillArm}


@contextmanager
def forcing_prefill(dataflow: Dataflow, arm: PrefillArm) -> Iterator[None]:
    """Prompts' attention by one implementation, the library's where it can."""
    before = dataflow.library_prefill_from
    dataflow.library_prefill_from = _FORCED[arm]
    try:
        yield
    finally:
        dataflow.library_prefill_from = before
