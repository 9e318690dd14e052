"""The paged KV cache in a GPU's memory."""

import torch
from torch import Tensor

from headrace.config import KvCacheFormat
from headrace.errors import KernelError
from headrace.kernels.kv_cache import GpuKvCache, KvCache, KvCacheSpec

_DTYPES = {
    KvCacheFormat.FLOAT32: torch.float32,
    KvCacheFormat.BFLOAT16: torch.bfloat16,
    KvCacheFormat.INT8: torch.int8,
}


def make_kv_cache(spec: KvCacheSpec, *, device: torch.device) -> GpuKvCache:
    """An empty cache. What was never written is never read, so that its memory need not be cleared."""
    shape = (2, spec.num_blocks, spec.num_kv_heads, spec.block_size)
    has_scales = spec.cache_format is KvCacheFormat.INT8
    return GpuKvCache(
        spec=spec,
        data=torch.empty((*shape, spec.head_dim), dtype=_DTYPES[spec.cache_format], device=device),
        scales=torch.empty(shape if has_scales else (2, 0), dtype=torch.float32, device=device),
        counts=torch.zeros(2, dtype=torch.int64, device=device),
    )


def kv_cache_num_bytes(spec: KvCacheSpec) -> int:
    """Memory of a cache, scales included."""
    entries = 2 * spec.num_slots * spec.num_kv_heads
    scale_bytes = 4 if spec.cache_format is KvCacheFormat.INT8 else 0
    return entries * (spec.head_dim * _DTYPES[spec.cache_format].itemsize + scale_bytes)


def read_kv(kv_cache: KvCache, slots: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values of some slots, as float32.

    Shapes:
        slots:   [n] int64
        returns: two tensors [n, num_kv_heads, head_dim]
    """
    kv_cache = gpu_cache(kv_cache)
    block_size = kv_cache.spec.block_size
    blocks, offsets = slots // block_size, slots % block_size
    key, value = (x.transpose(1, 2)[blocks, offsets].float() for x in kv_cache.data)
    if kv_cache.spec.cache_format is not KvCacheFormat.INT8:
        return key, value
    key_scale, value_scale = (x.transpose(1, 2)[blocks, offsets, :, None] for x in kv_cache.scales)
    return key * key_scale, value * value_scale


def gpu_cache(kv_cache: KvCache) -> GpuKvCache:
    if not isinstance(kv_cache, GpuKvCache):
        raise KernelError(f"the triton kernels take their own KV caches, not {type(kv_cache).__name__}")
    return kv_cache
