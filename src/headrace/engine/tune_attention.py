"""Measures the decode attention of a model over the length of its context: softmax schemes and numbers of pieces.

On a CPU of one sequence, as batches give threads enough work of their own; on a GPU of some batches too.
"""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import date
from functools import partial

import torch

from headrace.config import KvCacheFormat, SoftmaxScheme
from headrace.engine.device_memory import available_bytes
from headrace.engine.kv_cache_spec import RankShape
from headrace.engine.tune import measuring_progress
from headrace.engine.tune_contexts import Contexts, batch_bytes
from headrace.kernels import Kernels
from headrace.kernels.attention_tuning import AttentionChoice, AttentionShape, AttentionTimes, TunedAttention
from headrace.kernels.timing import best_of_rounds, timer_of

CONTEXTS = (128, 512, 2048, 8192, 32768)
BATCHES = (8, 64)
"""Numbers of sequences, beside one."""

_MAX_BATCH_BYTES = 512 * 2**20
"""Of the keys and values of a batch: 64 contexts of 2,048 tokens of 8 heads of 128 in bfloat16. Longer ones would take
a measurement's time for little: the more work there is, the less it matters who does it."""
_MEMORY_SHARE = 4
"""The cache takes at most one in so many bytes that are free; graphs and what steps share take the others."""

_PIECES_PER_THREAD = (1, 2, 8)
_PROGRAMS_PER_MULTIPROCESSOR = (1, 3, 4)
"""Beside the kernels' own number, which is 2."""

_MAX_CAPTURED_CALLS = 64


def attention_shape(shape: RankShape, cache_format: KvCacheFormat) -> AttentionShape:
    return AttentionShape(
        cache_format=cache_format,
        num_heads=shape.num_heads,
        num_kv_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
    )


def candidates(
    schemes: Sequence[SoftmaxScheme], num_workers: int, multiples: Sequence[int] = _PIECES_PER_THREAD
) -> list[AttentionChoice]:
    """The default first, then what differs from it more and more. One worker takes a context in one piece anyway."""
    pieces = (None, *(n * num_workers for n in multiples)) if num_workers > 1 else (None,)
    order = (SoftmaxScheme.SYNCHRONIZED, SoftmaxScheme.LAZY, SoftmaxScheme.ASYNCHRONIZED)
    return [AttentionChoice(scheme=scheme, max_pieces=most) for scheme in order if scheme in schemes for most in pieces]


def contexts_of(max_model_len: int) -> list[int]:
    """Those that the model can have, or its longest where all are longer."""
    return [n for n in CONTEXTS if n <= max_model_len] or [max_model_len]


def batch_contexts(kernels: Kernels, shape: AttentionShape, contexts: Sequence[int]) -> dict[int, list[int]]:
    """Of these, for each batch, those that there is memory for; no batch without any."""
    room_bytes = min(_MAX_BATCH_BYTES, available_bytes(kernels.device) // _MEMORY_SHARE)
    found = {
        num_seqs: [n for n in contexts if batch_bytes(kernels, shape, num_seqs, n) <= room_bytes]
        for num_seqs in BATCHES
    }
    return {num_seqs: fitting for num_seqs, fitting in found.items() if fitting}


def measure_attention(
    kernels: Kernels,
    shape: AttentionShape,
    *,
    contexts: Sequence[int],
    num_threads: int,
    num_rounds: int,
    show_progress: bool = False,
    make_run: "MakeRun | None" = None,
    clock: Callable[[], float] = time.perf_counter,
) -> TunedAttention:
    """Time every choice for each length of the context. A GPU's calls are timed by its own clock, in a graph for each
    choice.

    make_run: what runs one token's attention; None takes the kernels, over a cache that outgrows the machine's.
    """
    if kernels.device.type == "cuda" and make_run is None:
        num_workers = torch.cuda.get_device_properties(kernels.device).multi_processor_count
        choices = candidates(kernels.softmax_schemes, num_workers, _PROGRAMS_PER_MULTIPROCESSOR)
        sizes = {1: contexts} | batch_contexts(kernels, shape, contexts)
        return measure_queued(kernels, shape, choices, sizes, num_rounds=num_rounds, show_progress=show_progress)
    choices = candidates(kernels.softmax_schemes, num_threads)
    run = (make_run or _make_run)(kernels, shape, max(contexts))

    def seconds(choice: AttentionChoice, context_len: int) -> float:
        start = clock()
        run(choice, context_len)
        return clock() - start

    def timers(context_len: int) -> dict[AttentionChoice, Callable[[], float]]:
        return {choice: partial(seconds, choice, context_len) for choice in choices}

    times = _times("attention", choices, contexts, timers, num_rounds, show_progress)
    return TunedAttention(measured_on=date.today().isoformat(), times=times)


def measure_queued(
    kernels: Kernels,
    shape: AttentionShape,
    choices: Sequence[AttentionChoice],
    sizes: Mapping[int, Sequence[int]],
    *,
    num_rounds: int,
    show_progress: bool = False,
) -> TunedAttention:
    """As `measure_attention`, where calls are queued: several in turn, over more than a GPU's cache holds.

    sizes: lengths of contexts for each number of sequences, one among them.
    """
    times = {
        num_seqs: _queued_times(kernels, shape, choices, num_seqs, contexts, num_rounds, show_progress)
        for num_seqs, contexts in sizes.items()
    }
    return TunedAttention(measured_on=date.today().isoformat(), times=times.pop(1), batches=times)


def _queued_times(
    kernels: Kernels,
    shape: AttentionShape,
    choices: Sequence[AttentionChoice],
    num_seqs: int,
    contexts: Sequence[int],
    num_rounds: int,
    show_progress: bool,
) -> AttentionTimes:
    prepared = Contexts(kernels, shape, max(contexts), num_seqs=num_seqs)

    def timers(context_len: int) -> dict[AttentionChoice, Callable[[], float]]:
        num_calls = min(_MAX_CAPTURED_CALLS, prepared.num_batches(context_len))
        calls = {choice: [prepared.call(choice, context_len) for _ in range(num_calls)] for choice in choices}
        return {choice: timer_of(same, device=kernels.device) for choice, same in calls.items()}

    what = "attention" if num_seqs == 1 else f"attention of {num_seqs} sequences"
    return _times(what, choices, contexts, timers, num_rounds, show_progress)


def _times(
    what: str,
    choices: Iterable[AttentionChoice],
    contexts: Sequence[int],
    timers: Callable[[int], Mapping[AttentionChoice, Callable[[], float]]],
    num_rounds: int,
    show_progress: bool,
) -> AttentionTimes:
    times: dict[AttentionChoice, dict[int, float]] = {choice: {} for choice in choices}
    with measuring_progress(f"measuring {what} (Ctrl-C ends it)", len(contexts), show_progress) as on_start:
        for context_len in contexts:
            on_start(f"{context_len} tokens")
            for choice, seconds in best_of_rounds(timers(context_len), num_rounds).items():
                times[choice][context_len] = seconds
    return times


Run = Callable[[AttentionChoice, int], object]
MakeRun = Callable[[Kernels, AttentionShape, int], Run]


def _make_run(kernels: Kernels, shape: AttentionShape, longest: int) -> Run:
    prepared = Contexts(kernels, shape, longest)
    return lambda choice, context_len: prepared.call(choice, context_len)()
