"""Weights filled block by block, straight into the layout the native kernels read (native/packed_matrix.h)."""

import torch
from torch import Tensor

from headrace import _native
from headrace.config import WeightFormat
from headrace.errors import KernelError, ShapeError
from headrace.kernels.cpu.linear import packed
from headrace.kernels.cpu.targets import best_target
from headrace.kernels.weights import PackedWeight, Weight, WeightBuilder, quantized_columns

_FORMATS = {
    WeightFormat.FLOAT32: _native.Format.FLOAT32,
    WeightFormat.BFLOAT16: _native.Format.BFLOAT16,
    WeightFormat.INT8: _native.Format.INT8,
    WeightFormat.INT4: _native.Format.INT4,
}
_DTYPES = {torch.float32: _native.DType.FLOAT32, torch.bfloat16: _native.DType.BFLOAT16}


def make_weight_builder(
    weight_format: WeightFormat, rows: int, columns: int, *, target: str | None = None
) -> WeightBuilder:
    """A builder for a packed [rows, columns] weight.

    target: the instruction set that rounds and quantizes, the best one if None; all give the same bits.
    """
    return _Builder(weight_format, rows, columns, target or best_target())


def weight_num_bytes(weight_format: WeightFormat, rows: int, columns: int) -> int:
    """Memory of a packed [rows, columns] weight, padding and scales included."""
    return _native.packed_bytes(_FORMATS[weight_format], rows, columns)


def weight_rows(weight: Weight, rows: range) -> Weight:
    """`reference.weight_rows`; num_bytes are those of the rows, though they share the whole weight's memory.

    Raises:
        ValueError: rows that do not begin and end with a panel.
    """
    weight = packed(weight)
    shape = (len(rows), weight.shape[1])
    return PackedWeight(
        weight_format=weight.weight_format,
        shape=shape,
        num_bytes=weight_num_bytes(weight.weight_format, *shape),
        matrix=weight.matrix.rows(rows.start, rows.stop),
    )


def quantize_rows(rows: Tensor, weight_format: WeightFormat, *, target: str | None = None) -> tuple[Tensor, Tensor]:
    """`reference.quantize_rows`, to the bit.

    Shapes:
        rows:    [n, K]
        returns: qweight and scales of `QuantizedWeight`
    Raises:
        KernelError: a value that is not finite.
    """
    rows = _readable(rows)
    num_rows, num_columns = rows.shape
    value_columns, scale_columns = quantized_columns(weight_format, num_columns)
    values = torch.empty(num_rows, value_columns, dtype=_value_dtype(weight_format))
    scales = torch.empty(num_rows, scale_columns)
    is_finite = _native.quantize_rows(
        target or best_target(),
        _FORMATS[weight_format],
        _DTYPES[rows.dtype],
        num_rows,
        num_columns,
        rows.data_ptr(),
        rows.stride(0),
        values.data_ptr(),
        scales.data_ptr(),
    )
    _check_finite(is_finite)
    return values, scales


class _Builder:
    def __init__(self, weight_format: WeightFormat, rows: int, columns: int, target: str) -> None:
        self._format, self._shape, self._target = weight_format, (rows, columns), target
        self._matrix = _native.PackedMatrix(_FORMATS[weight_format], rows, columns)

    def write(self, row: int, block: Tensor) -> None:
        self._check_columns(block, self._shape[1])
        block = _readable(block)
        is_finite = self._matrix.write_rows(
            self._target, row, _DTYPES[block.dtype], len(block), block.data_ptr(), block.stride(0)
        )
        _check_finite(is_finite)

    def write_quantized(self, row: int, qweight: Tensor, scales: Tensor) -> None:
        if self._format not in (WeightFormat.INT8, WeightFormat.INT4):
            raise NotImplementedError("a dense weight takes floating-point rows")
        value_columns, scale_columns = quantized_columns(self._format, self._shape[1])
        self._check_columns(qweight, value_columns)
        self._check_columns(scales, scale_columns)
        if len(qweight) != len(scales):
            raise ShapeError(f"{len(qweight)} rows of values, {len(scales)} of scales")
        if not (scales.abs() < 2.0**126).all():
            raise KernelError("a quantized weight has a scale that is NaN, infinite or above 2^126")
        qweight = qweight.view(torch.uint8).contiguous()
        scales = scales.float().contiguous()
        self._matrix.write_quantized_rows(row, len(qweight), qweight.data_ptr(), scales.data_ptr())

    def build(self) -> Weight:
        return PackedWeight(
            weight_format=self._format,
            shape=self._shape,
            num_bytes=weight_num_bytes(self._format, *self._shape),
            matrix=self._matrix,
        )

    def _check_columns(self, block: Tensor, columns: int) -> None:
        if block.dim() != 2 or block.shape[1] != columns:
            raise ShapeError(f"a block of shape {list(block.shape)} for rows of {columns} columns")


def _readable(rows: Tensor) -> Tensor:
    """float32 or bfloat16 with neighbouring columns, as the native module reads it."""
    if rows.dtype not in _DTYPES:
        rows = rows.float()
    return rows if rows.stride(1) == 1 else rows.contiguous()


def _value_dtype(weight_format: WeightFormat) -> torch.dtype:
    return torch.uint8 if weight_format is WeightFormat.INT4 else torch.int8


def _check_finite(is_finite: bool) -> None:
    if not is_finite:
        raise KernelError("cannot quantize a weight that holds NaN or infinity")
