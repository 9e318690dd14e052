"""Weights filled block by block, in the layout the reference ops read."""

import torch
from torch import Tensor

from headrace.config import WeightFormat
from headrace.kernels.reference.quantize import quantize_rows
from headrace.kernels.weights import DenseWeight, QuantizedWeight, Weight, WeightBuilder, quantized_columns

_CPU = torch.device("cpu")

_DENSE_DTYPES = {WeightFormat.FLOAT32: torch.float32, WeightFormat.BFLOAT16: torch.bfloat16}


def make_weight_builder(
    weight_format: WeightFormat, rows: int, columns: int, *, device: torch.device = _CPU
) -> WeightBuilder:
    """A builder for a [rows, columns] weight on a device."""
    if weight_format in _DENSE_DTYPES:
        return _DenseBuilder(_DENSE_DTYPES[weight_format], rows, columns, device)
    return _QuantizedBuilder(weight_format, rows, columns, device)


def weight_num_bytes(weight_format: WeightFormat, rows: int, columns: int) -> int:
    """Memory of a [rows, columns] weight."""
    if weight_format in _DENSE_DTYPES:
        return rows * columns * _DENSE_DTYPES[weight_format].itemsize
    num_values, num_scales = quantized_columns(weight_format, columns)
    return rows * (num_values + num_scales * torch.float32.itemsize)


class _DenseBuilder:
    def __init__(self, dtype: torch.dtype, rows: int, columns: int, device: torch.device) -> None:
        self.data = torch.empty(rows, columns, dtype=dtype, device=device)

    def write(self, row: int, block: Tensor) -> None:
        self.data[row : row + len(block)].copy_(block)

    def write_quantized(self, row: int, qweight: Tensor, scales: Tensor) -> None:
        raise NotImplementedError("a dense weight takes floating-point rows")

    def build(self) -> Weight:
        return DenseWeight(data=self.data)


class _QuantizedBuilder:
    def __init__(self, weight_format: WeightFormat, rows: int, columns: int, device: torch.device) -> None:
        self.weight_format, self.columns = weight_format, columns
        qweight_columns, scale_columns = quantized_columns(weight_format, columns)
        dtype = torch.uint8 if weight_format is WeightFormat.INT4 else torch.int8
        self.qweight = torch.empty(rows, qweight_columns, dtype=dtype, device=device)
        self.scales = torch.empty(rows, scale_columns, dtype=torch.float32, device=device)

    def write(self, row: int, block: Tensor) -> None:
        self.write_quantized(row, *quantize_rows(block, self.weight_format))

    def write_quantized(self, row: int, qweight: Tensor, scales: Tensor) -> None:
        self.qweight[row : row + len(qweight)].copy_(qweight)
        self.scales[row : row + len(scales)].copy_(scales)

    def build(self) -> Weight:
        return QuantizedWeight(
            weight_format=self.weight_format, qweight=self.qweight, scales=self.scales, in_features=self.columns
        )
