"""Measures the decode attention of a model over the length of its context: softmax schemes and numbers of pieces."""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import date
from functools import partial
from itertools import count

import torch

from headrace.config import KvCacheFormat, SoftmaxScheme
from headrace.engine.kv_cache_spec import RankShape
from headrace.engine.tune import measuring_progress
from headrace.kernels import AttentionSpec, Kernels, KvCacheSpec, SoftmaxSpec
from headrace.kernels.attention_tuning import AttentionChoice, AttentionShape, TunedAttention
from headrace.kernels.timing import best_of_rounds, timer_of

CONTEXTS = (128, 512, 2048, 8192, 32768)

_WORKING_SET_BYTES = 128 * 2**20
"""More than caches hold: a model reads every layer's keys and values, and its weights, before it meets one again."""

_PIECES_PER_THREAD = (1, 2, 8)
_PROGRAMS_PER_MULTIPROCESSOR = (1, 3, 4)
"""Beside the kernels' own number, which is 2."""

_MAX_CAPTURED_CALLS = 64

_BLOCK_SIZE = 16
_FILL_TOKENS = 1024


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
        return measure_queued(kernels, shape, choices, contexts, num_rounds=num_rounds, show_progress=show_progress)
    choices = candidates(kernels.softmax_schemes, num_threads)
    run = (make_run or _make_run)(kernels, shape, max(contexts))

    def seconds(choice: AttentionChoice, context_len: int) -> float:
        start = clock()
        run(choice, context_len)
        return clock() - start

    def timers(context_len: int) -> dict[AttentionChoice, Callable[[], float]]:
        return {choice: partial(seconds, choice, context_len) for choice in choices}

    return _tuned(choices, contexts, timers, num_rounds, show_progress)


def measure_queued(
    kernels: Kernels,
    shape: AttentionShape,
    choices: Sequence[AttentionChoice],
    contexts: Sequence[int],
    *,
    num_rounds: int,
    show_progress: bool = False,
) -> TunedAttention:
    """As `measure_attention`, where calls are queued: several in turn, over more than a GPU's cache holds."""
    prepared = Contexts(kernels, shape, max(contexts))

    def timers(context_len: int) -> dict[AttentionChoice, Callable[[], float]]:
        num_calls = min(_MAX_CAPTURED_CALLS, prepared.num_contexts(context_len))
        calls = {choice: [prepared.call(choice, context_len) for _ in range(num_calls)] for choice in choices}
        return {choice: timer_of(same, device=kernels.device) for choice, same in calls.items()}

    return _tuned(choices, contexts, timers, num_rounds, show_progress)


def _tuned(
    choices: Iterable[AttentionChoice],
    contexts: Sequence[int],
    timers: Callable[[int], Mapping[AttentionChoice, Callable[[], float]]],
    num_rounds: int,
    show_progress: bool,
) -> TunedAttention:
    times: dict[AttentionChoice, dict[int, float]] = {choice: {} for choice in choices}
    with measuring_progress("measuring attention (Ctrl-C ends it)", len(contexts), show_progress) as on_start:
        for context_len in contexts:
            on_start(f"{context_len} tokens")
            for choice, seconds in best_of_rounds(timers(context_len), num_rounds).items():
                times[choice][context_len] = seconds
    return TunedAttention(measured_on=date.today().isoformat(), times=times)


Run = Callable[[AttentionChoice, int], object]
MakeRun = Callable[[Kernels, AttentionShape, int], Run]


def _make_run(kernels: Kernels, shape: AttentionShape, longest: int) -> Run:
    prepared = Contexts(kernels, shape, longest)
    return lambda choice, context_len: prepared.call(choice, context_len)()


class Contexts:
    """Contexts in one cache, each call's after the one before; blocks in no order, as in a busy engine.

    num_new: the last tokens of each, which attend.
    """

    def __init__(self, kernels: Kernels, shape: AttentionShape, longest: int, num_new: int = 1) -> None:
        self._kernels, self._device = kernels, kernels.device
        dtype = torch.float32 if shape.cache_format is KvCacheFormat.FLOAT32 else torch.bfloat16
        self._spec = _cache_spec(kernels, shape, -(-longest // _BLOCK_SIZE))
        self._cache = kernels.make_kv_cache(self._spec)
        no_queries = torch.empty(_FILL_TOKENS, 0, shape.head_dim, dtype=dtype, device=self._device)
        key, value = torch.randn(2, _FILL_TOKENS, shape.num_kv_heads, shape.head_dim).to(self._device, dtype)
        for slots in torch.split(torch.arange(self._spec.num_slots, device=self._device), _FILL_TOKENS):
            n = len(slots)
            kernels.rotary_store_kv_(no_queries[:n], key[:n], value[:n], self._cache, slots, None)
        self._query = torch.randn(num_new, shape.num_heads, shape.head_dim).to(self._device, dtype)
        self._order = torch.randperm(self._spec.num_blocks, dtype=torch.int32).to(self._device)
        self._bounds = torch.tensor([0, num_new], dtype=torch.int32, device=self._device)
        self._attention_specs = {
            scheme: AttentionSpec(softmax_scale=shape.head_dim**-0.5, softmax=SoftmaxSpec(scheme=scheme))
            for scheme in kernels.softmax_schemes
        }
        self._calls = count()

    def num_contexts(self, context_len: int) -> int:
        return self._spec.num_blocks // -(-context_len // _BLOCK_SIZE)

    def call(self, choice: AttentionChoice, context_len: int) -> Callable[[], object]:
        """One token's attention over the next context of so many tokens."""
        dataflow, attend = self._kernels.dataflow, self.attend(choice.scheme, context_len)
        assert dataflow is not None, "there is nothing to choose"

        def run() -> object:
            dataflow.max_pieces = choice.max_pieces
            try:
                return attend()
            finally:
                dataflow.max_pieces = None

        return run

    def attend(self, scheme: SoftmaxScheme, context_len: int) -> Callable[[], object]:
        """Attention over the next context of so many tokens, as the dataflow then has it."""
        num_blocks = -(-context_len // _BLOCK_SIZE)
        first = next(self._calls) % self.num_contexts(context_len) * num_blocks
        table = self._order[first : first + num_blocks][None]
        lens = torch.tensor([context_len], dtype=torch.int32, device=self._device)
        spec = self._attention_specs[scheme]
        return lambda: self._kernels.attention(self._query, self._cache, table, lens, self._bounds, spec)


def _cache_spec(kernels: Kernels, shape: AttentionShape, num_blocks: int) -> KvCacheSpec:
    def spec(count: int) -> KvCacheSpec:
        return KvCacheSpec(
            cache_format=shape.cache_format,
            num_blocks=count,
            block_size=_BLOCK_SIZE,
            num_kv_heads=shape.num_kv_heads,
            head_dim=shape.head_dim,
        )

    return spec(max(num_blocks, _WORKING_SET_BYTES // kernels.kv_cache_num_bytes(spec(1))))
