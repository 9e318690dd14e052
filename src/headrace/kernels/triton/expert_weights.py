"""The weights of a mixture's experts, where they are: tables of addresses on the device, and products with tiles."""

from dataclasses import dataclass
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
import triton
import triton.language as tl
from torch import Tensor

from headrace.config import WeightFormat
from headrace.errors import KernelError
from headrace.kernels.triton.nibbles import half, unpack
from headrace.kernels.weights import BlockedWeight, DenseWeight, Experts, Weight


@dataclass(frozen=True, kw_only=True)
class WeightTable:
    """Matrices of one shape and format.

    num_bits: of an entry: 0 for floating point, 8 or 4 for integers with scales.
    shape: [N, K] of each.

    Shapes: values, scales, row_scales: [num_experts] int64, addresses; those of values where there are no scales
    """

    shape: tuple[int, int]
    dtype: torch.dtype
    num_bits: int
    is_aligned: bool
    values: Tensor
    scales: Tensor
    row_scales: Tensor


@dataclass(frozen=True, kw_only=True)
class WeightKind:
    """What products are compiled for.

    dtype: of dense weights, and of results; dot_dtype: what is multiplied.
    num_bits, is_aligned: as in `WeightTable`.
    """

    dtype: tl.dtype
    dot_dtype: tl.dtype
    num_bits: int
    is_aligned: bool
    is_ptx: bool


class Matrix(NamedTuple):
    """One expert's, [num_rows, num_columns]."""

    values_address: Any
    scales_address: Any
    row_scales_address: Any
    num_rows: Any
    num_columns: Any


@triton.jit
def load_columns(x_ptrs, is_row, begin, num_columns, WEIGHT: tl.constexpr, SIZE: tl.constexpr):
    """SIZE columns of some rows of x, transposed, zeros past their end: in pieces as `add_product` multiplies them."""
    pieces: tl.tuple
    if WEIGHT.num_bits == 4:
        pieces = (
            _load_columns(x_ptrs, is_row, begin, num_columns, WEIGHT.dot_dtype, 16),
            _load_columns(x_ptrs, is_row, begin + 16, num_columns, WEIGHT.dot_dtype, 16),
            _load_columns(x_ptrs, is_row, begin + 32, num_columns, WEIGHT.dot_dtype, 16),
            _load_columns(x_ptrs, is_row, begin + 48, num_columns, WEIGHT.dot_dtype, 16),
        )
    elif WEIGHT.num_bits == 8:
        pieces = (
            _load_columns(x_ptrs, is_row, begin, num_columns, WEIGHT.dot_dtype, 32),
            _load_columns(x_ptrs, is_row, begin + 32, num_columns, WEIGHT.dot_dtype, 32),
        )
    else:
        pieces = (_load_columns(x_ptrs, is_row, begin, num_columns, WEIGHT.dot_dtype, SIZE),)
    return pieces


@triton.jit
def _load_columns(x_ptrs, is_row, begin, num_columns, DOT_DTYPE: tl.constexpr, SIZE: tl.constexpr):
    k = begin + tl.arange(0, SIZE)
    x = tl.load(x_ptrs + k[:, None], mask=is_row[None, :] & (k < num_columns)[:, None], other=0.0)
    return x.to(DOT_DTYPE)


@triton.jit
def add_product(out, x, matrix, rows, begin, WEIGHT: tl.constexpr, SCALES_SUMS: tl.constexpr, SIZE: tl.constexpr):
    """out + W x, of SIZE columns of one expert's matrix W from `begin` on, and x of them.

    Quantized, SIZE is 64. SCALES_SUMS: x is multiplied with exact integers, whose sums by group of 32 columns are then
    scaled (`blocked_flat_gemm`); else integers are, and rounded once, which pays where x has more than 32 rows. The
    scale of each row is left to `scale_rows`. Reads 16 bytes at a time where all rows begin at multiples.
    """
    if WEIGHT.num_bits == 0:
        columns = begin + tl.arange(0, SIZE)
        is_inside = (rows < matrix.num_rows)[:, None] & (columns < matrix.num_columns)[None, :]
        w_ptr = _pointer(matrix.values_address, WEIGHT.dtype, WEIGHT.is_aligned)
        w = tl.load(
            w_ptr + rows.to(tl.int64)[:, None] * matrix.num_columns + columns[None, :], mask=is_inside, other=0.0
        )
        out = tl.dot(w.to(WEIGHT.dot_dtype), x[0], out, input_precision="ieee")
    else:
        # Blocks past the last one are another matrix's memory.
        is_row = rows < tl.where(begin < matrix.num_columns, matrix.num_rows, 0)
        place = (rows + begin // 64 * matrix.num_rows).to(tl.int64)
        pair = tl.load(matrix.scales_address.to(tl.pointer_type(tl.int32)) + place, mask=is_row, other=0)
        if WEIGHT.num_bits == 4:
            words_ptr = _pointer(matrix.values_address, tl.int16, WEIGHT.is_aligned) + place[:, None] * 16
            words = tl.load(words_ptr + tl.arange(0, 16)[None, :], mask=is_row[:, None], other=0)
            q = unpack(words, WEIGHT.dot_dtype, WEIGHT.is_ptx)
            for group in tl.static_range(2):
                scale = half(pair, group)[:, None]
                if SCALES_SUMS:
                    sums = tl.dot(q[2 * group], x[2 * group], input_precision="ieee")
                    sums = tl.dot(q[2 * group + 1], x[2 * group + 1], sums, input_precision="ieee")
                    out += sums * scale
                else:
                    w = (q[2 * group].to(tl.float32) * scale).to(WEIGHT.dot_dtype)
                    out = tl.dot(w, x[2 * group], out, input_precision="ieee")
                    w = (q[2 * group + 1].to(tl.float32) * scale).to(WEIGHT.dot_dtype)
                    out = tl.dot(w, x[2 * group + 1], out, input_precision="ieee")
        else:
            bytes_ptr = _pointer(matrix.values_address, tl.int8, WEIGHT.is_aligned) + place[:, None] * 64
            for group in tl.static_range(2):
                group_ptr = bytes_ptr + 32 * group + tl.arange(0, 32)[None, :]
                q = tl.load(group_ptr, mask=is_row[:, None], other=0)
                scale = half(pair, group)[:, None]
                if SCALES_SUMS:
                    out += tl.dot(q.to(WEIGHT.dot_dtype), x[group], input_precision="ieee") * scale
                else:
                    out = tl.dot((q.to(tl.float32) * scale).to(WEIGHT.dot_dtype), x[group], out, input_precision="ieee")
    return out


@triton.jit
def scale_rows(out, matrix, rows, WEIGHT: tl.constexpr):
    """What `add_product` leaves to be done once."""
    if WEIGHT.num_bits > 0:
        row_scales_ptr = matrix.row_scales_address.to(tl.pointer_type(tl.float32))
        out *= tl.load(row_scales_ptr + rows.to(tl.int64), mask=rows < matrix.num_rows, other=0.0)[:, None]
    return out


@triton.jit
def _pointer(address, DTYPE: tl.constexpr, IS_ALIGNED: tl.constexpr):
    pointer = address.to(tl.pointer_type(DTYPE))
    if IS_ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


class ExpertTables:
    """Tables of up and down matrices, made once for each `Experts` and kept as long as it lives."""

    def __init__(self) -> None:
        self._tables: WeakKeyDictionary[Experts, tuple[WeightTable, WeightTable]] = WeakKeyDictionary()

    def of(self, experts: Experts) -> tuple[WeightTable, WeightTable]:
        """
        Raises:
            KernelError: matrices of several formats or shapes, of a format without a kernel, or not contiguous.
        """
        found = self._tables.get(experts)
        if found is None:
            found = self._tables[experts] = make_weight_table(experts.up), make_weight_table(experts.down)
        return found


def make_weight_table(weights: tuple[Weight, ...]) -> WeightTable:
    kinds = {(_num_bits(weight), weight.shape, _values(weight).dtype) for weight in weights}
    if len(kinds) != 1:
        raise KernelError(f"experts differ in format or shape: {sorted(map(str, kinds))}; all must be alike")
    ((num_bits, shape, dtype),) = kinds
    values = [_values(weight) for weight in weights]
    blocked = [weight for weight in weights if isinstance(weight, BlockedWeight)]
    scales, row_scales = [weight.scales for weight in blocked], [weight.row_scales for weight in blocked]
    if not all(part.is_contiguous() for part in values + scales + row_scales):
        raise KernelError("an expert's weight is not contiguous")
    row_bytes = values[0].shape[-1] * values[0].element_size()
    return WeightTable(
        shape=shape,
        dtype=dtype,
        num_bits=num_bits,
        is_aligned=row_bytes % 16 == 0 and all(part.data_ptr() % 16 == 0 for part in values),
        values=_addresses(values),
        scales=_addresses(scales or values),
        row_scales=_addresses(row_scales or values),
    )


def _addresses(parts: list[Tensor]) -> Tensor:
    return torch.tensor([part.data_ptr() for part in parts], dtype=torch.int64).to(parts[0].device)


def _num_bits(weight: Weight) -> int:
    match weight:
        case DenseWeight():
            return 0
        case BlockedWeight(weight_format=WeightFormat.INT8):
            return 8
        case BlockedWeight(weight_format=WeightFormat.INT4):
            return 4
        case _:
            raise KernelError(f"Triton's mixtures cannot read a {type(weight).__name__}")


def _values(weight: Weight) -> Tensor:
    if isinstance(weight, DenseWeight):
        return weight.data
    assert isinstance(weight, BlockedWeight), "checked by _num_bits"
    return weight.values
