"""Tensors as rows, for kernels that work on the last dimension."""

from typing import NamedTuple

import triton
from torch import Tensor

from headrace.errors import ShapeError


class Rows(NamedTuple):
    """Row i begins at (i // num_inner) * outer_stride + (i % num_inner) * inner_stride; its entries are adjacent."""

    num_rows: int
    num_inner: int
    outer_stride: int
    inner_stride: int
    size: int


def rows_of(x: Tensor) -> Rows:
    """
    Raises:
        ShapeError: x has more than three dimensions that no two strides describe, or entries that are not adjacent.
    """
    if x.dim() == 0 or (x.dim() > 3 and not x.is_contiguous()) or (x.stride(-1) != 1 and x.shape[-1] != 1):
        raise ShapeError(
            f"x is {list(x.shape)} with strides {x.stride()}; want up to 3 dimensions, the last adjacent, or contiguous"
        )
    size = x.shape[-1]
    if x.dim() == 2:
        return Rows(x.shape[0], 1, x.stride(0), 0, size)
    if x.dim() == 3:
        return Rows(x.shape[0] * x.shape[1], max(x.shape[1], 1), x.stride(0), x.stride(1), size)
    return Rows(x.numel() // max(size, 1), 1, size, 0, size)


def warps_for(num_elements: int) -> int:
    """Warps of a program that holds so many elements at once: eight a thread, which is 16 bytes in 16 bits."""
    return int(min(max(triton.next_power_of_2(num_elements) // 256, 1), 16))
