"""Weights filled block by block, straight into the layout the native kernels read (native/packed_matrix.h)."""

import torch
from torch import Tensor

from headrace import _native
from headrace.config import WeightFormat
from headrace.errors import KernelError, ShapeError
from headrace.kernels.reference import quantize_rows
from headrace.kernels.weights import PackedWeight, Weight, WeightBuilder, quantized_columns

_FORMATS = {
    WeightFormat.FLOAT32: _native.Format.FLOAT32,
    WeightFormat.BFLOAT16: _native.Format.BFLOAT16,
    WeightFormat.INT8: _native.Format.INT8,
    WeightFormat.INT4: _native.Format.INT4,
}
_DENSE_DTYPES = {WeightFormat.FLOAT32: torch.float32, WeightFormat.BFLOAT16: torch.bfloat16}


def make_weight_builder(weight_format: WeightFormat, rows: int, columns: int) -> WeightBuilder:
    """A builder for a packed [rows, columns] weight."""
    if weight_format in _DENSE_DTYPES:
        return _DenseBuilder(weight_format, rows, columns)
    return _QuantizedBuilder(weight_format, rows, columns)


def weight_num_bytes(weight_format: WeightFormat, rows: int, columns: int) -> int:
    """Memory of a packed [rows, columns] weight, padding and scales included."""
    return _native.packed_bytes(_FORMATS[weight_format], rows, columns)


class _Builder:
    def __init__(self, weight_format: WeightFormat, rows: int, columns: int) -> None:
        self._format, self._shape = weight_format, (rows, columns)
        self._matrix = _native.PackedMatrix(_FORMATS[weight_format], rows, columns)

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


class _DenseBuilder(_Builder):
    def write(self, row: int, block: Tensor) -> None:
        self._check_columns(block, self._shape[1])
        block = block.to(_DENSE_DTYPES[self._format]).contiguous()
        self._matrix.write_rows(row, len(block), block.data_ptr())

    def write_quantized(self, row: int, qweight: Tensor, scales: Tensor) -> None:
        raise NotImplementedError("a dense weight takes floating-point rows")


class _QuantizedBuilder(_Builder):
    def write(self, row: int, block: Tensor) -> None:
        self.write_quantized(row, *quantize_rows(block, self._format))

    def write_quantized(self, row: int, qweight: Tensor, scales: Tensor) -> None:
        value_columns, scale_columns = quantized_columns(self._format, self._shape[1])
        self._check_columns(qweight, value_columns)
        self._check_columns(scales, scale_columns)
        if len(qweight) != len(scales):
            raise ShapeError(f"{len(qweight)} rows of values, {len(scales)} of scales")
        if not torch.isfinite(scales).all():
            raise KernelError("a quantized weight has a scale that is NaN or infinite")
        qweight = qweight.view(torch.uint8).contiguous()
        scales = scales.float().contiguous()
        self._matrix.write_quantized_rows(row, len(qweight), qweight.data_ptr(), scales.data_ptr())
