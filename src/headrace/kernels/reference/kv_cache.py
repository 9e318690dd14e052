"""The paged KV cache as plain tensors."""

import torch
from torch import Tensor

from headrace.config import KvCacheFormat
from headrace.errors import KernelError
from headrace.kernels.kv_cache import (
    NOT_STORED,
    DenseKvCache,
    GpuKvCache,
    KvCache,
    KvCacheSpec,
    PackedKvCache,
    QuantizedKvCache,
)
from headrace.kernels.reference.rotary import rotary_

_CPU = torch.device("cpu")

_DTYPES = {
    KvCacheFormat.FLOAT32: torch.float32,
    KvCacheFormat.BFLOAT16: torch.bfloat16,
    KvCacheFormat.INT8: torch.int8,
}


def make_kv_cache(spec: KvCacheSpec, *, device: torch.device = _CPU) -> KvCache:
    """An empty cache; on the CPU its memory is claimed from the system as blocks are first written."""
    shape = (2, spec.num_blocks, spec.block_size, spec.num_kv_heads, spec.head_dim)
    data = torch.empty(shape, dtype=_DTYPES[spec.cache_format], device=device)
    if spec.cache_format is KvCacheFormat.INT8:
        return QuantizedKvCache(spec=spec, data=data, scales=torch.empty(shape[:-1], device=device))
    return DenseKvCache(spec=spec, data=data)


def kv_cache_num_bytes(spec: KvCacheSpec) -> int:
    """Memory of a cache, scales included."""
    entries = 2 * spec.num_slots * spec.num_kv_heads
    scale_bytes = 4 if spec.cache_format is KvCacheFormat.INT8 else 0
    return entries * (spec.head_dim * _DTYPES[spec.cache_format].itemsize + scale_bytes)


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

    Keys may be rotated in place or not: they are not to be read afterwards. Without cos_sin nothing is rotated.

    Shapes:
        query:        [num_tokens, num_heads, head_dim]
        key, value:   [num_tokens, num_kv_heads, head_dim]
        slot_mapping: [num_tokens] int64, block_id * block_size + offset; NOT_STORED writes nothing
        cos, sin:     [num_tokens, half] float32, see `rotary_`
    """
    wide = key.float()
    if cos_sin is not None:
        wide = wide.clone()
        rotary_(query, *cos_sin, interleaved=interleaved)
        rotary_(wide, *cos_sin, interleaved=interleaved)
    is_stored = slot_mapping != NOT_STORED
    rows = (wide[is_stored], value.float()[is_stored])
    slot_mapping = slot_mapping[is_stored]
    match kv_cache:
        case QuantizedKvCache():
            scales = [row_scales(x) for x in rows]
            is_bad = scales[0].isnan() | scales[1].isnan()
            for kind, x in enumerate(rows):
                scale = scales[kind].masked_fill(is_bad, torch.nan)
                kv_cache.scales[kind].flatten(0, 1).index_copy_(0, slot_mapping, scale)
                kv_cache.data[kind].flatten(0, 1).index_copy_(0, slot_mapping, quantize(x, scale))
        case DenseKvCache():
            for kind, x in enumerate(rows):
                kv_cache.data[kind].flatten(0, 1).index_copy_(0, slot_mapping, x.to(kv_cache.data.dtype))
        case PackedKvCache() | GpuKvCache():
            raise _not_ours()


def read_kv(kv_cache: KvCache, slots: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values of some slots, as float32.

    Shapes:
        slots:   [n] int64
        returns: two tensors [n, num_kv_heads, head_dim]
    """
    match kv_cache:
        case QuantizedKvCache():
            scaled = kv_cache.data.flatten(1, 2)[:, slots].float() * kv_cache.scales.flatten(1, 2)[:, slots, :, None]
            return scaled[0], scaled[1]
        case DenseKvCache():
            key, value = kv_cache.data.flatten(1, 2)[:, slots].float()
            return key, value
        case PackedKvCache() | GpuKvCache():
            raise _not_ours()


def row_scales(x: Tensor) -> Tensor:
    """max|x| / 127 of each row; NaN where an entry is not finite, 0 where that would be no normal number."""
    largest = x.abs().amax(dim=-1)
    scales = torch.where(largest.isfinite(), largest / 127.0, torch.nan)
    return torch.where(scales < torch.finfo(torch.float32).tiny, 0.0, scales)


def quantize(x: Tensor, scales: Tensor) -> Tensor:
    """round(x * (1 / scale)); zeros where the scale is 0 or NaN."""
    inverse = torch.where(scales > 0, 1.0 / scales, 0.0)[..., None]
    return torch.where(inverse > 0, x * inverse, 0.0).round().to(torch.int8)


def _not_ours() -> KernelError:
    return KernelError("the reference kernels read their own KV caches alone")
