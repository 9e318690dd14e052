"""Heads of new tokens, as every backend's kernels want them."""

from collections.abc import Collection

import torch
from torch import Tensor

from headrace.errors import KernelError, ShapeError
from headrace.kernels.kv_cache import KvCacheSpec


def is_by_token(x: Tensor) -> bool:
    """Whether each token's heads lie side by side: [num_tokens, num_heads, head_dim] with any stride between tokens."""
    return x.stride(2) == 1 and (x.shape[1] == 1 or x.stride(1) == x.shape[2])


def by_token(x: Tensor) -> Tensor:
    return x if is_by_token(x) else x.contiguous()


def check_stored_heads(
    query: Tensor, key: Tensor, value: Tensor, spec: KvCacheSpec, half: int, dtypes: Collection[torch.dtype]
) -> None:
    """Of tokens whose query is rotated in place and whose key and value go to the cache.

    half: pairs that are rotated in each head.

    Raises:
        ShapeError: tensors that do not fit together or the cache, or a query whose heads do not lie side by side.
        KernelError: dtypes that differ or that kernels do not take.
    """
    expected = len(query), spec.num_kv_heads, spec.head_dim
    if key.shape != expected or value.shape != expected or query.shape[2] != spec.head_dim:
        raise ShapeError(
            f"query {list(query.shape)}, key {list(key.shape)} and value {list(value.shape)} do not fit a cache of "
            f"{spec.num_kv_heads} KV heads of {spec.head_dim}"
        )
    if 2 * half > spec.head_dim:
        raise ShapeError(f"{half} rotary pairs do not fit a head of {spec.head_dim}")
    if query.dtype not in dtypes or not query.dtype == key.dtype == value.dtype:
        allowed = " or ".join(f"all {str(dtype).removeprefix('torch.')}" for dtype in dtypes)
        raise KernelError(f"query is {query.dtype}, key {key.dtype}, value {value.dtype}; allowed: {allowed}")
    if not is_by_token(query):
        raise ShapeError(f"query has strides {query.stride()}; the heads of a token must lie side by side")
