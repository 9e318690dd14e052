"""Attention alone, over contexts and of prompts, by softmax scheme, beside its limits."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from headrace.bench.kernel_rounds import KernelFigure, num_copies, time_rounds
from headrace.bench.kernels import ModelShape
from headrace.config import KvCacheFormat, SoftmaxScheme, WeightFormat
from headrace.kernels import AttentionSpec, Kernels, KvCache, KvCacheSpec, SoftmaxSpec

_BLOCK_SIZE = 16
_MULTIPLIES = {
    KvCacheFormat.FLOAT32: WeightFormat.FLOAT32,
    KvCacheFormat.BFLOAT16: WeightFormat.BFLOAT16,
    KvCacheFormat.INT8: WeightFormat.INT8,
}
"""The weights whose peak bounds attention over a cache."""


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
    on_start: Callable[[str], None],
) -> Iterator[AttentionFigure]:
    """Every softmax scheme over caches of every format; lengths: (context_len, num_new).

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
            times = time_rounds(kernels, runs, len(caches), _MULTIPLIES[cache_format])
            for scheme, seconds in zip(kernels.softmax_schemes, times.seconds, strict=True):
                yield AttentionFigure(
                    cache_format=cache_format,
                    scheme=scheme,
                    context_len=context_len,
                    num_new=num_new,
                    num_bytes=num_bytes,
                    num_ops=num_ops,
                    seconds=seconds,
                    read_bytes_per_s=times.read_bytes_per_s,
                    ops_per_s=times.ops_per_s,
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
    for _ in range(num_copies(kernels.kv_cache_num_bytes(spec))):
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
