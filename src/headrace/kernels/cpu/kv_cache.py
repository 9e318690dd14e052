"""The paged KV cache in the layout of the native kernels (native/kv_cache.h)."""

import torch
from torch import Tensor

from headrace import _native
from headrace.config import KvCacheFormat
from headrace.errors import KernelError
from headrace.kernels.kv_cache import KvCache, KvCacheSpec, PackedKvCache

_FORMATS = {
    KvCacheFormat.FLOAT32: _native.Format.FLOAT32,
    KvCacheFormat.BFLOAT16: _native.Format.BFLOAT16,
    KvCacheFormat.INT8: _native.Format.INT8,
}


def make_kv_cache(spec: KvCacheSpec) -> KvCache:
    """An empty cache; its memory is claimed from the system as blocks are first written.

    Raises:
        KernelError: a head_dim the native kernels do not take.
    """
    try:
        return PackedKvCache(spec=spec, cache=_native.KvCache(*_shape(spec)))
    except ValueError as error:
        raise KernelError(str(error)) from error


def kv_cache_num_bytes(spec: KvCacheSpec) -> int:
    """Memory of a cache, scales and padding included.

    Raises:
        KernelError: a head_dim the native kernels do not take.
    """
    try:
        return _native.kv_cache_bytes(*_shape(spec))
    except ValueError as error:
        raise KernelError(str(error)) from error


def read_kv(kv_cache: KvCache, slots: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values of some slots, as float32.

    Shapes:
        slots:   [n] int64
        returns: two tensors [n, num_kv_heads, head_dim]
    Raises:
        IndexError: a slot the cache has not.
    """
    kv_cache = packed(kv_cache)
    slots = slots.long().contiguous()
    shape = len(slots), kv_cache.spec.num_kv_heads, kv_cache.spec.head_dim
    keys, values = torch.empty(shape), torch.empty(shape)
    kv_cache.cache.read_slots(slots.data_ptr(), len(slots), keys.data_ptr(), values.data_ptr())
    return keys, values


def packed(kv_cache: KvCache) -> PackedKvCache:
    if not isinstance(kv_cache, PackedKvCache):
        raise KernelError(f"the cpu kernels take their own KV caches, not {type(kv_cache).__name__}")
    return kv_cache


def _shape(spec: KvCacheSpec) -> tuple[_native.Format, int, int, int, int]:
    return _FORMATS[spec.cache_format], spec.num_blocks, spec.block_size, spec.num_kv_heads, spec.head_dim
