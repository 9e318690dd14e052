"""Rows of weights in a type to compute in: those of tokens for an embedding, or a range of them for a library."""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from headrace.kernels.triton.weights import blocked
from headrace.kernels.weights import BlockedWeight, DenseWeight, Weight

_BLOCK_K = 1024


@triton.jit(do_not_specialize=["offset"])
def gather_dense_kernel(
    ids_ptr,
    w_ptr,
    out_ptr,
    N,
    K,
    offset,
    w_row_stride,
    scale,
    outside,
    BLOCK_K: tl.constexpr,
):
    """out[i] = scale * w[ids[i] + offset], or `outside` where that is no row. Grid: (ids, blocks of K)."""
    row = tl.load(ids_ptr + tl.program_id(0)) + offset
    k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    is_inside = (row >= 0) & (row < N)
    num_columns = tl.where(is_inside, K, 0)
    w = tl.load(w_ptr + row.to(tl.int64) * w_row_stride + k, mask=k < num_columns, other=0.0)
    _store_row(out_ptr, w.to(tl.float32), k, K, is_inside, scale, outside)


@triton.jit(do_not_specialize=["offset"])
def gather_blocked_kernel(
    ids_ptr,
    values_ptr,
    scales_ptr,
    row_scales_ptr,
    out_ptr,
    N,
    K,
    offset,
    values_block_stride,
    scales_block_stride,
    scale,
    outside,
    IS_INT4: tl.constexpr,
    HAS_IDS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The same from a blocked weight; without ids, out[i] = scale * w[i + offset]. Grid: (ids, blocks of K)."""
    if HAS_IDS:
        row = tl.load(ids_ptr + tl.program_id(0)).to(tl.int64) + offset
    else:
        row = tl.program_id(0).to(tl.int64) + offset
    k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    is_inside = (row >= 0) & (row < N)
    has_column = k < tl.where(is_inside, K, 0)
    b, column = k // 64, k % 64
    block_ptrs = values_ptr + b.to(tl.int64) * values_block_stride
    if IS_INT4:
        words = tl.load(block_ptrs + row * 16 + column % 16, mask=has_column, other=0).to(tl.int32)
        q = ((words >> (column // 16 * 4)) & 15) - 8
    else:
        q = tl.load(block_ptrs + row * 64 + column, mask=has_column, other=0).to(tl.int32)
    scale_ptrs = scales_ptr + b.to(tl.int64) * scales_block_stride + row * 2 + column // 32
    scales = tl.load(scale_ptrs, mask=has_column, other=0.0).to(tl.float32)
    row_scale = tl.load(row_scales_ptr + row, mask=is_inside, other=0.0)
    _store_row(out_ptr, q.to(tl.float32) * (scales * row_scale), k, K, is_inside, scale, outside)


@triton.jit
def _store_row(out_ptr, values, k, K, is_inside, scale, outside):
    """Rounded before the product with the scale, and after it."""
    rounded = values.to(out_ptr.dtype.element_ty).to(tl.float32) * scale
    out = tl.where(is_inside, rounded, outside)
    tl.store(out_ptr + tl.program_id(0).to(tl.int64) * K + k, out, mask=k < K)


def embedding(
    ids: Tensor,
    weight: Weight,
    *,
    dtype: torch.dtype,
    scale: float = 1.0,
    offset: int = 0,
    zeros_outside: bool = False,
) -> Tensor:
    """`reference.embedding` for dense and blocked weights.

    zeros_outside: an id that is not in the weight gives zeros. Otherwise it gives NaN, as a device cannot raise without
        being waited for.

    Shapes:
        ids:     [num_tokens] integers
        weight:  [vocab_size, size]
        returns: [num_tokens, size] of dtype
    """
    out = torch.empty(*ids.shape, weight.shape[1], dtype=dtype, device=ids.device)
    if out.numel() == 0:
        return out
    outside = 0.0 if zeros_outside else math.nan
    _gather(ids.contiguous(), weight, out.view(-1, weight.shape[1]), offset, scale, outside)
    return out


def dequantize_rows(weight: BlockedWeight, rows: range, out: Tensor) -> None:
    """Shapes: out [len(rows), K] contiguous."""
    _gather(None, weight, out, rows.start, 1.0, 0.0)


def _gather(ids: Tensor | None, weight: Weight, out: Tensor, offset: int, scale: float, outside: float) -> None:
    num_rows, num_columns = weight.shape
    grid = (len(out), triton.cdiv(num_columns, _BLOCK_K))
    if isinstance(weight, DenseWeight):
        w = weight.data
        gather_dense_kernel[grid](
            ids, w, out, num_rows, num_columns, offset, w.stride(0), scale, outside, BLOCK_K=_BLOCK_K
        )
        return
    weight = blocked(weight)
    gather_blocked_kernel[grid](
        out if ids is None else ids,
        weight.values,
        weight.scales,
        weight.row_scales,
        out,
        num_rows,
        num_columns,
        offset,
        weight.values.stride(0),
        weight.scales.stride(0),
        scale,
        outside,
        IS_INT4=weight.is_int4,
        HAS_IDS=ids is not None,
        BLOCK_K=_BLOCK_K,
    )
