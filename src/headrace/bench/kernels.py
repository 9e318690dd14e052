"""The kernels alone, beside the time this machine needs at least: bytes over bandwidth, or operations over the peak.

Weights and caches rotate through copies larger than any cache of the machine, as the layers of a model do. Each time is
the best of several calls in several rounds, so that what else the machine does meanwhile drops out. On shared machines
bandwidth itself changes from one second to the next: it is measured beside each kernel, in the same rounds. On a GPU a
time is that of one call among many that the device works off without a gap, see `kernels.timing`.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from headrace.config import KvCacheFormat, SoftmaxScheme, WeightFormat
from headrace.kernels import AttentionSpec, Kernels, KvCache, KvCacheSpec, SoftmaxSpec, Weight
from headrace.kernels.timing import TimedCalls, time_calls

_WORKING_SET_BYTES = 256 * 2**20
_NUM_ROUNDS = 3
_MIN_CALLS, _MIN_S = 5, 0.03  # in each round
_READ_BUFFER_BYTES = {"cpu": 256 * 2**20, "cuda": 2 * 2**30}
_BLOCK_SIZE = 16
_KV_WEIGHT_FORMATS = {
    KvCacheFormat.FLOAT32: WeightFormat.FLOAT32,
    KvCacheFormat.BFLOAT16: WeightFormat.BFLOAT16,
    KvCacheFormat.INT8: WeightFormat.INT8,
}


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """The sizes of a Llama-like model that its kernels see."""

    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    vocab_size: int

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """[N, K] of each linear layer: q, k and v fused, gate and up fused."""
        heads = self.num_heads + 2 * self.num_kv_heads
        return {
            "qkv": (heads * self.head_dim, self.hidden_size),
            "o": (self.hidden_size, self.hidden_size),
            "gate_up": (2 * self.intermediate_size, self.hidden_size),
            "down": (self.hidden_size, self.intermediate_size),
            "lm_head": (self.vocab_size, self.hidden_size),
        }


SHAPES = {
    "smollm-135m": ModelShape(hidden_size=576, intermediate_size=1536, num_heads=9, num_kv_heads=3, vocab_size=32000),
    "tinyllama-1.1b": ModelShape(
        hidden_size=2048, intermediate_size=5632, num_heads=32, num_kv_heads=4, vocab_size=32000
    ),
    "llama2-7b": ModelShape(hidden_size=4096, intermediate_size=11008, num_heads=32, num_kv_heads=32, vocab_size=32000),
}


@dataclass(frozen=True, kw_only=True)
class KernelLimits:
    """Measured in the same run. ops_per_s: by what is multiplied; an operation is a multiply or an add."""

    read_bytes_per_s: float
    ops_per_s: Mapping[WeightFormat, float]

    def floor_s(self, num_bytes: int, num_ops: int, weight_format: WeightFormat) -> float:
        return max(num_bytes / self.read_bytes_per_s, num_ops / self.ops_per_s[weight_format])


def measure_kernel_limits(kernels: Kernels) -> KernelLimits:
    return KernelLimits(
        read_bytes_per_s=_read_bytes_per_s(kernels),
        ops_per_s={f: kernels.machine.multiply_ops_per_s(f)[1] for f in WeightFormat},
    )


def _read_bytes_per_s(kernels: Kernels) -> float:
    return kernels.machine.read_bytes_per_s(_READ_BUFFER_BYTES[kernels.device.type])


class _Recorded:
    """A kernel on each copy of what it reads, as a decode step replays it: asking for a small one from Python may take
    longer than it runs."""

    def __init__(self, kernels: Kernels, run: Callable[[int], object], num_copies: int) -> None:
        self._run = run  # a recording holds pointers to what is kept here
        self._replays = [kernels.record(partial(run, i))[1].replay for i in range(num_copies)]

    def __call__(self, i: int) -> None:
        replay = self._replays[i]
        if replay is None:
            self._run(i)
        else:
            replay()


class _Rounds:
    """Times some kernels, each on its copies of what it reads, and the memory's bandwidth, in turn and then again."""

    def __init__(
        self, kernels: Kernels, limits: KernelLimits, runs: Sequence[Callable[[int], object]], num_copies: int
    ) -> None:
        self.seconds = [float("inf")] * len(runs)
        timed = [_timed(kernels, run, num_copies) for run in runs]
        read_bytes_per_s = 0.0
        for _ in range(_NUM_ROUNDS):
            read_bytes_per_s = max(read_bytes_per_s, _read_bytes_per_s(kernels))
            for i, calls in enumerate(timed):
                self.seconds[i] = min(self.seconds[i], calls.best_s(min_calls=_MIN_CALLS, min_s=_MIN_S))
        self.limits = replace(limits, read_bytes_per_s=read_bytes_per_s)


def _timed(kernels: Kernels, run: Callable[[int], object], num_copies: int) -> TimedCalls:
    """On a GPU all copies become one graph, which a recording of each would not make faster."""
    call = run if kernels.device.type == "cuda" else _Recorded(kernels, run, num_copies)
    return time_calls([partial(call, i) for i in range(num_copies)], kernels.device)


@dataclass(frozen=True, kw_only=True)
class KernelFigure:
    """num_bytes: what the kernel must read; read_bytes_per_s: the machine's, measured beside it."""

    num_bytes: int
    seconds: float
    read_bytes_per_s: float
    floor_s: float

    @property
    def share(self) -> float:
        """How much of the limit was reached: 1 is all of it."""
        return self.floor_s / self.seconds


@dataclass(frozen=True, kw_only=True)
class LinearFigure(KernelFigure):
    """One linear layer for num_rows rows. num_bytes: the weight's, packed, scales included."""

    weight_format: WeightFormat
    layer: str
    out_features: int
    in_features: int
    num_rows: int


def measure_linears(
    kernels: Kernels,
    shape: ModelShape,
    formats: Sequence[WeightFormat],
    rows: Sequence[int],
    limits: KernelLimits,
    on_start: Callable[[str], None],
) -> Iterator[LinearFigure]:
    """Every layer of the shape in every format, for every number of rows; of `limits` bandwidth is measured anew."""
    for weight_format in formats:
        dtype = torch.float32 if weight_format is WeightFormat.FLOAT32 else torch.bfloat16
        for layer, (n, k) in shape.linears.items():
            on_start(f"{weight_format.value} {layer} [{n}, {k}]")
            weights = _weights(kernels, weight_format, n, k)
            runs = [_linear(kernels, weights, torch.randn(m, k, device=kernels.device).to(dtype)) for m in rows]
            rounds = _Rounds(kernels, limits, runs, len(weights))
            for m, seconds in zip(rows, rounds.seconds, strict=True):
                num_bytes = weights[0].num_bytes
                yield LinearFigure(
                    weight_format=weight_format,
                    layer=layer,
                    out_features=n,
                    in_features=k,
                    num_rows=m,
                    num_bytes=num_bytes,
                    seconds=seconds,
                    read_bytes_per_s=rounds.limits.read_bytes_per_s,
                    floor_s=rounds.limits.floor_s(num_bytes, 2 * m * n * k, weight_format),
                )


def _linear(kernels: Kernels, weights: Sequence[Weight], x: Tensor) -> Callable[[int], object]:
    return lambda i: kernels.linear(x, weights[i])


def _weights(kernels: Kernels, weight_format: WeightFormat, n: int, k: int) -> list[Weight]:
    matrix = torch.randn(n, k, device=kernels.device)
    weights = []
    for _ in range(-(-_WORKING_SET_BYTES // kernels.weight_num_bytes(weight_format, n, k))):
        builder = kernels.make_weight_builder(weight_format, n, k)
        builder.write(0, matrix)
        weights.append(builder.build())
    return weights


@dataclass(frozen=True, kw_only=True)
class AttentionFigure(KernelFigure):
    """num_new tokens at the end of a context: one while decoding, all of it in a prefill.

    num_bytes: of the keys and values seen, scales included.
    """

    cache_format: KvCacheFormat
    scheme: SoftmaxScheme
    context_len: int
    num_new: int


def measure_attention(
    kernels: Kernels,
    shape: ModelShape,
    formats: Sequence[KvCacheFormat],
    lengths: Sequence[tuple[int, int]],
    limits: KernelLimits,
    on_start: Callable[[str], None],
) -> Iterator[AttentionFigure]:
    """Every softmax scheme over caches of every format; lengths: (context_len, num_new). Of `limits` bandwidth is
    measured anew.

    A causal prefill of n tokens is counted as 4 * head_dim * num_heads * n (n + 1) / 2 operations. With an int8 cache
    probabilities have two digits, so that each multiplication by a value is two of int8.
    """
    for cache_format in formats:
        for context_len, num_new in lengths:
            on_start(f"attention over {context_len} tokens, {cache_format.value}")
            caches = _caches(kernels, shape, cache_format, context_len)
            num_bytes = kernels.kv_cache_num_bytes(caches[0].spec)
            pairs = num_new * (2 * context_len - num_new + 1) // 2
            num_products = 3 if cache_format is KvCacheFormat.INT8 else 2  # of keys and of values
            num_ops = num_products * 2 * shape.head_dim * shape.num_heads * pairs
            runs = [_attention(kernels, shape, caches, (context_len, num_new), s) for s in kernels.softmax_schemes]
            rounds = _Rounds(kernels, limits, runs, len(caches))
            for scheme, seconds in zip(kernels.softmax_schemes, rounds.seconds, strict=True):
                yield AttentionFigure(
                    cache_format=cache_format,
                    scheme=scheme,
                    context_len=context_len,
                    num_new=num_new,
                    num_bytes=num_bytes,
                    seconds=seconds,
                    read_bytes_per_s=rounds.limits.read_bytes_per_s,
                    floor_s=rounds.limits.floor_s(num_bytes, num_ops, _KV_WEIGHT_FORMATS[cache_format]),
                )


def _caches(kernels: Kernels, shape: ModelShape, cache_format: KvCacheFormat, context_len: int) -> list[KvCache]:
    spec = KvCacheSpec(
        cache_format=cache_format,
        num_blocks=-(-context_len // _BLOCK_SIZE),
        block_size=_BLOCK_SIZE,
        num_kv_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
    )
    dtype = _activation_dtype(cache_format)
    size = (spec.num_slots, spec.num_kv_heads, spec.head_dim)
    key, value = (torch.randn(size, device=kernels.device).to(dtype) for _ in range(2))
    no_queries = key[:, :0]
    slots = torch.arange(spec.num_slots, device=kernels.device)
    caches = []
    for _ in range(-(-_WORKING_SET_BYTES // kernels.kv_cache_num_bytes(spec))):
        cache = kernels.make_kv_cache(spec)
        kernels.rotary_store_kv_(no_queries, key, value, cache, slots, None)
        caches.append(cache)
    return caches


def _attention(
    kernels: Kernels, shape: ModelShape, caches: Sequence[KvCache], length: tuple[int, int], scheme: SoftmaxScheme
) -> Callable[[int], object]:
    (context_len, num_new), device = length, kernels.device
    dtype = _activation_dtype(caches[0].spec.cache_format)
    query = torch.randn(num_new, shape.num_heads, shape.head_dim, device=device).to(dtype)
    # Blocks that lie in no order, as in an engine that has run for a while.
    tables = torch.randperm(caches[0].spec.num_blocks, dtype=torch.int32, device=device)[None]
    context_lens = torch.tensor([context_len], dtype=torch.int32, device=device)
    bounds = torch.tensor([0, num_new], dtype=torch.int32, device=device)
    spec = AttentionSpec(softmax_scale=shape.head_dim**-0.5, softmax=SoftmaxSpec(scheme=scheme))
    return lambda i: kernels.attention(query, caches[i], tables, context_lens, bounds, spec)


def _activation_dtype(cache_format: KvCacheFormat) -> torch.dtype:
    return torch.float32 if cache_format is KvCacheFormat.FLOAT32 else torch.bfloat16
