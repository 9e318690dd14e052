"""Normalization, with the residual addition before it."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from headrace.errors import ShapeError
from headrace.kernels.triton.rows import Rows, rows_of, warps_for

_MIN_ELEMENTS = 1024
"""Of a program: it takes several rows where they are shorter."""

_ADD_BLOCK = 1024


@triton.jit(do_not_specialize=["num_rows"])
def norm_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    num_rows,
    num_inner,
    outer_stride,
    inner_stride,
    size,
    eps,
    IS_LAYER_NORM: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    UNIT_OFFSET: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    """Grid: one program for BLOCK_ROWS rows, which it reads once; residual and out are contiguous."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    columns = tl.arange(0, BLOCK_SIZE)
    is_inside = (rows < num_rows)[:, None] & (columns < size)[None, :]
    starts = (rows // num_inner) * outer_stride + (rows % num_inner) * inner_stride
    x = tl.load(x_ptr + starts[:, None] + columns[None, :], mask=is_inside, other=0.0)
    contiguous = rows[:, None] * size + columns[None, :]
    # Before the sums, so that nothing waits for these after them.
    weight = tl.load(weight_ptr + columns, mask=columns < size, other=0.0).to(tl.float32)
    if IS_LAYER_NORM:
        bias = tl.load(bias_ptr + columns, mask=columns < size, other=0.0)
    if HAS_RESIDUAL:
        residual = tl.load(residual_ptr + contiguous, mask=is_inside, other=0.0)
        x = (residual.to(tl.float32) + x.to(tl.float32)).to(x_ptr.dtype.element_ty)
        tl.store(residual_ptr + contiguous, x, mask=is_inside)
    wide = x.to(tl.float32)
    if IS_LAYER_NORM:
        mean = tl.sum(wide, axis=1) / size
        wide = tl.where(is_inside, wide - mean[:, None], 0.0)
    scale = tl.rsqrt(tl.sum(wide * wide, axis=1) / size + eps)
    if UNIT_OFFSET:
        weight += 1.0
    out = wide * scale[:, None] * weight[None, :]
    if IS_LAYER_NORM:
        out += bias.to(tl.float32)[None, :]
    tl.store(out_ptr + contiguous, out.to(out_ptr.dtype.element_ty), mask=is_inside)


@triton.jit
def add_kernel(residual_ptr, x_ptr, num_elements, BLOCK: tl.constexpr):
    """residual += x, both contiguous. Grid: one program for BLOCK elements."""
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    is_inside = offsets < num_elements
    residual = tl.load(residual_ptr + offsets, mask=is_inside)
    x = tl.load(x_ptr + offsets, mask=is_inside)
    total = residual.to(tl.float32) + x.to(tl.float32)
    tl.store(residual_ptr + offsets, total.to(residual_ptr.dtype.element_ty), mask=is_inside)


def rms_norm(
    x: Tensor, weight: Tensor, *, eps: float, unit_offset: bool = False, residual: Tensor | None = None
) -> Tensor:
    """`reference.rms_norm`. A row's result depends on that row alone, to the bit.

    Shapes:
        x: [..., size], contiguous, or of up to three dimensions with any strides but the last's and no residual
    Raises:
        ShapeError: the arguments do not fit together.
    """
    _check_parameters(x, weight)
    return _normalize(x, weight, weight, eps, residual, is_layer_norm=False, unit_offset=unit_offset)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, *, eps: float, residual: Tensor | None = None) -> Tensor:
    """`reference.layer_norm`; as `rms_norm` otherwise."""
    _check_parameters(x, weight, bias)
    return _normalize(x, weight, bias, eps, residual, is_layer_norm=True, unit_offset=False)


def add_(residual: Tensor, x: Tensor) -> None:
    """residual += x, both contiguous."""
    _check_contiguous(residual, x)
    if num_elements := x.numel():
        grid = (triton.cdiv(num_elements, _ADD_BLOCK),)
        add_kernel[grid](residual, x, num_elements, BLOCK=_ADD_BLOCK, num_warps=warps_for(_ADD_BLOCK))


def _normalize(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    residual: Tensor | None,
    *,
    is_layer_norm: bool,
    unit_offset: bool,
) -> Tensor:
    if residual is not None:
        _check_contiguous(residual, x)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rows = rows_of(x)
    if out.numel() == 0:
        return out
    block_rows, block_size = _blocks(rows)
    norm_kernel[(triton.cdiv(rows.num_rows, block_rows),)](
        x,
        out if residual is None else residual,
        weight,
        bias,
        out,
        *rows,
        eps,
        IS_LAYER_NORM=is_layer_norm,
        HAS_RESIDUAL=residual is not None,
        UNIT_OFFSET=unit_offset,
        BLOCK_ROWS=block_rows,
        BLOCK_SIZE=block_size,
        num_warps=warps_for(block_rows * block_size),
    )
    return out


def _blocks(rows: Rows) -> tuple[int, int]:
    """Rows and entries of a program. They follow from the size of a row alone, and so does the order of its sums."""
    block_size = triton.next_power_of_2(rows.size)
    return max(1, _MIN_ELEMENTS // block_size), block_size


def _check_parameters(x: Tensor, *parameters: Tensor) -> None:
    for parameter in parameters:
        if parameter.shape != x.shape[-1:] or not parameter.is_contiguous():
            raise ShapeError(f"norm of {list(x.shape)} with a weight or bias of {list(parameter.shape)}")


def _check_contiguous(residual: Tensor, x: Tensor) -> None:
    if residual.shape != x.shape or residual.dtype != x.dtype:
        raise ShapeError(f"residual is {list(residual.shape)} {residual.dtype}, x {list(x.shape)} {x.dtype}")
    if not (residual.is_contiguous() and x.is_contiguous()):
        raise ShapeError("x and the residual it is added to must be contiguous")
