"""Rotary position embedding, and the write of new keys and values to the cache, in one pass."""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from headrace.config import KvCacheFormat
from headrace.kernels.kv_cache import KvCache
from headrace.kernels.token_heads import by_token, check_stored_heads
from headrace.kernels.triton.attention_arguments import KeysAndValues
from headrace.kernels.triton.kv_cache import gpu_cache

QUERY_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_PROGRAM_HEADS = 8
"""Heads of a program: of 128 entries in bfloat16, each of its 128 threads then loads 16 bytes of a value at once."""

_ROUND_TO_INTEGER: tl.constexpr = tl.constexpr(12582912.0)
"""1.5 * 2^23: float32 has no digits left after the point there, so that adding and subtracting it rounds to even."""
_LEAST_NORMAL: tl.constexpr = tl.constexpr(2.0**-126)


@dataclass(frozen=True, kw_only=True)
class StoredHeads:
    """Of queries and of the cache. half: pairs that are rotated in each head, 0 for none."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    half: int
    block_size: int
    interleaved: bool
    is_int8: bool


def rotary_store_kv_(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kv_cache: KvCache,
    slot_mapping: Tensor,
    cos_sin: tuple[Tensor, Tensor] | None,
    *,
    interleaved: bool = False,
) -> None:
    """Rotate queries in place; write rotated keys, and values, to their tokens' slots, rounded once.

    One program for each token and 8 heads: query heads first, then KV heads. Keys are not changed where they are.

    Shapes:
        query:        [num_tokens, num_heads, head_dim], the heads of a token side by side
        key, value:   [num_tokens, num_kv_heads, head_dim], dtype of query
        slot_mapping: [num_tokens] int64; NOT_STORED writes nothing
        cos, sin:     [num_tokens, half] float32
    Raises:
        ShapeError: tensors that do not fit together or the cache.
        KernelError: dtypes that do not.
    """
    cache = gpu_cache(kv_cache)
    spec = cache.spec
    half = 0 if cos_sin is None else cos_sin[0].shape[-1]
    check_stored_heads(query, key, value, spec, half, QUERY_DTYPES)
    key, value = by_token(key), by_token(value)
    num_tokens, num_heads, head_dim = query.shape
    query_programs = triton.cdiv(num_heads, _PROGRAM_HEADS) if half else 0
    if num_tokens == 0:
        return
    cos, sin = (query, query) if cos_sin is None else (x.contiguous() for x in cos_sin)
    rotary_store_kernel[(num_tokens, query_programs + triton.cdiv(spec.num_kv_heads, _PROGRAM_HEADS))](
        query,
        key,
        value,
        cos,
        sin,
        slot_mapping.contiguous(),
        *cache.keys_and_values,
        query.stride(0),
        key.stride(0),
        value.stride(0),
        HEADS=StoredHeads(
            num_heads=num_heads,
            num_kv_heads=spec.num_kv_heads,
            head_dim=head_dim,
            half=half,
            block_size=spec.block_size,
            interleaved=interleaved,
            is_int8=spec.cache_format is KvCacheFormat.INT8,
        ),
        QUERY_PROGRAMS=query_programs,
        PROGRAM_HEADS=_PROGRAM_HEADS,
        num_warps=4,
    )


@triton.jit(do_not_specialize_on_alignment=("slots_ptr",))
def rotary_store_kernel(
    query_ptr,
    key_ptr,
    value_ptr,
    cos_ptr,
    sin_ptr,
    slots_ptr,
    key_cache_ptr,
    value_cache_ptr,
    key_scales_ptr,
    value_scales_ptr,
    query_token_stride,
    key_token_stride,
    value_token_stride,
    HEADS: tl.constexpr,
    QUERY_PROGRAMS: tl.constexpr,
    PROGRAM_HEADS: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    program = tl.program_id(1)
    if program < QUERY_PROGRAMS:
        if HEADS.half > 0:
            heads = (program * PROGRAM_HEADS + tl.arange(0, PROGRAM_HEADS))[:, None]
            row = query_ptr + token * query_token_stride + heads * HEADS.head_dim
            is_head = heads < HEADS.num_heads
            a, b, at_a, at_b, is_pair = _rotated(row, is_head, cos_ptr, sin_ptr, token, HEADS)
            tl.store(row + at_a, a, mask=is_pair)
            tl.store(row + at_b, b, mask=is_pair)
    else:
        slot = tl.load(slots_ptr + token)
        # What another rank stores has a negative slot.
        if slot >= 0:
            cache = KeysAndValues(key_cache_ptr, value_cache_ptr, key_scales_ptr, value_scales_ptr)
            key = key_ptr + token * key_token_stride
            value = value_ptr + token * value_token_stride
            kv_heads = (program - QUERY_PROGRAMS) * PROGRAM_HEADS + tl.arange(0, PROGRAM_HEADS)
            _store_kv(key, value, cos_ptr, sin_ptr, cache, token, slot, kv_heads, HEADS)


@triton.jit
def _rotated(row, is_head, cos_ptr, sin_ptr, token, HEADS: tl.constexpr):
    """The pairs of some heads, rotated, in float32; where in a head they lie; and which there are."""
    i = tl.arange(0, triton.next_power_of_2(HEADS.half))[None, :]
    at_a = 2 * i if HEADS.interleaved else i
    at_b = 2 * i + 1 if HEADS.interleaved else i + HEADS.half
    is_pair = is_head & (i < HEADS.half)
    cos = tl.load(cos_ptr + token * HEADS.half + i, mask=i < HEADS.half, other=0.0)
    sin = tl.load(sin_ptr + token * HEADS.half + i, mask=i < HEADS.half, other=0.0)
    a = tl.load(row + at_a, mask=is_pair, other=0.0).to(tl.float32)
    b = tl.load(row + at_b, mask=is_pair, other=0.0).to(tl.float32)
    return a * cos - b * sin, b * cos + a * sin, at_a, at_b, is_pair


@triton.jit
def _store_kv(key_ptr, value_ptr, cos_ptr, sin_ptr, cache, token, slot, heads, HEADS: tl.constexpr):
    REST: tl.constexpr = HEADS.head_dim - 2 * HEADS.half
    is_head = heads < HEADS.num_kv_heads
    entry = (slot // HEADS.block_size * HEADS.num_kv_heads + heads) * HEADS.block_size + slot % HEADS.block_size
    to = cache.keys_ptr + entry[:, None] * HEADS.head_dim
    row = key_ptr + heads[:, None] * HEADS.head_dim
    d = tl.arange(0, triton.next_power_of_2(HEADS.head_dim))[None, :]
    is_value = is_head[:, None] & (d < HEADS.head_dim)
    value = tl.load(value_ptr + heads[:, None] * HEADS.head_dim + d, mask=is_value, other=0.0).to(tl.float32)
    largest = tl.zeros(heads.shape, tl.float32)
    is_bad = _is_bad(value, cache.values_ptr, HEADS.is_int8)
    if HEADS.half > 0:
        a, b, at_a, at_b, is_pair = _rotated(row, is_head[:, None], cos_ptr, sin_ptr, token, HEADS)
        is_bad |= _is_bad(a, cache.keys_ptr, HEADS.is_int8) | _is_bad(b, cache.keys_ptr, HEADS.is_int8)
        largest = tl.maximum(tl.max(tl.abs(a), axis=1), tl.max(tl.abs(b), axis=1))
    if REST > 0:
        at_rest = 2 * HEADS.half + tl.arange(0, triton.next_power_of_2(REST))[None, :]
        is_rest = is_head[:, None] & (at_rest < HEADS.head_dim)
        rest = tl.load(row + at_rest, mask=is_rest, other=0.0).to(tl.float32)
        is_bad |= _is_bad(rest, cache.keys_ptr, HEADS.is_int8)
        largest = tl.maximum(largest, tl.max(tl.abs(rest), axis=1))
    is_bad = is_bad > 0
    if HEADS.is_int8:
        scale, inverse = _scales(largest, is_bad)
        tl.store(cache.key_scales_ptr + entry, scale, mask=is_head)
        if HEADS.half > 0:
            tl.store(to + at_a, _quantized(a, inverse), mask=is_pair)
            tl.store(to + at_b, _quantized(b, inverse), mask=is_pair)
        if REST > 0:
            tl.store(to + at_rest, _quantized(rest, inverse), mask=is_rest)
        scale, inverse = _scales(tl.max(tl.abs(value), axis=1), is_bad)
        tl.store(cache.value_scales_ptr + entry, scale, mask=is_head)
        tl.store(cache.values_ptr + entry[:, None] * HEADS.head_dim + d, _quantized(value, inverse), mask=is_value)
    else:
        # Whoever sees the token gets NaN from its key; to whoever does not, 0 times its value is 0.
        if HEADS.half > 0:
            tl.store(to + at_a, tl.where(is_bad[:, None], float("nan"), a), mask=is_pair)
            tl.store(to + at_b, tl.where(is_bad[:, None], float("nan"), b), mask=is_pair)
        if REST > 0:
            tl.store(to + at_rest, tl.where(is_bad[:, None], float("nan"), rest), mask=is_rest)
        value = tl.where(is_bad[:, None], 0.0, value)
        tl.store(cache.values_ptr + entry[:, None] * HEADS.head_dim + d, value, mask=is_value)


@triton.jit
def _is_bad(x, cache_ptr, IS_INT8: tl.constexpr):
    """1 for rows with an entry that is not finite, or is not as the cache stores it."""
    if not IS_INT8:
        x = x.to(cache_ptr.dtype.element_ty).to(tl.float32)
    return tl.max((x - x != 0.0).to(tl.int32), axis=1)


@triton.jit
def _scales(largest, is_bad):
    """max|x| / 127, or 0 where that is no normal number, or NaN; and its inverse, or 0 for those."""
    scale = largest / 127.0
    is_small = scale < _LEAST_NORMAL
    has_none = is_bad | is_small
    inverse = tl.where(has_none, 0.0, 1.0 / tl.where(has_none, 1.0, scale))
    return tl.where(is_bad, float("nan"), tl.where(is_small, 0.0, scale)), inverse


@triton.jit
def _quantized(x, inverse):
    """Zeros where the inverse is 0, of NaN and infinity too."""
    q = tl.where(inverse[:, None] > 0.0, x * inverse[:, None], 0.0)
    return ((q + _ROUND_TO_INTEGER) - _ROUND_TO_INTEGER).to(tl.int8)
