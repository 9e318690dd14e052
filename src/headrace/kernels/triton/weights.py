"""Weights on a GPU, filled block by block while a checkpoint streams in."""

from functools import partial

import torch
from torch import Tensor

from headrace.config import WeightFormat
from headrace.errors import KernelError, ShapeError
from headrace.kernels.reference import quantize_rows
from headrace.kernels.weights import (
    BLOCK_COLUMNS,
    QUANTIZATION_GROUP_SIZE,
    BlockedWeight,
    DenseWeight,
    QuantizedWeight,
    Weight,
    WeightBuilder,
    quantized_columns,
)

_DENSE_DTYPES = {WeightFormat.FLOAT32: torch.float32, WeightFormat.BFLOAT16: torch.bfloat16}
_GROUPS = BLOCK_COLUMNS // QUANTIZATION_GROUP_SIZE
_NIBBLES = 4
_WORDS = BLOCK_COLUMNS // _NIBBLES
_BLOCK_BYTES = {WeightFormat.INT8: BLOCK_COLUMNS, WeightFormat.INT4: 2 * _WORDS}


def make_weight_builder(weight_format: WeightFormat, rows: int, columns: int, *, device: torch.device) -> WeightBuilder:
    """A builder for a [rows, columns] weight on a device."""
    if weight_format in _DENSE_DTYPES:
        return _DenseBuilder(_DENSE_DTYPES[weight_format], rows, columns, device)
    return _BlockedBuilder(weight_format, rows, columns, device)


def weight_num_bytes(weight_format: WeightFormat, rows: int, columns: int) -> int:
    """Memory of a [rows, columns] weight, padding and scales included."""
    if weight_format in _DENSE_DTYPES:
        return rows * columns * _DENSE_DTYPES[weight_format].itemsize
    block_bytes = _BLOCK_BYTES[weight_format] + _GROUPS * torch.float16.itemsize
    return rows * (num_blocks(columns) * block_bytes + torch.float32.itemsize)


def weight_rows(weight: Weight, rows: range) -> Weight:
    """Rows of a weight as one of their own, in the same memory.

    Shapes:
        weight:  [N, K]
        returns: [len(rows), K]
    """
    part = slice(rows.start, rows.stop)
    if isinstance(weight, DenseWeight):
        return DenseWeight(data=weight.data[part])
    weight = blocked(weight)
    return BlockedWeight(
        weight_format=weight.weight_format,
        in_features=weight.in_features,
        values=weight.values[:, part],
        scales=weight.scales[:, part],
        row_scales=weight.row_scales[part],
    )


def blocked(weight: Weight) -> BlockedWeight:
    if not isinstance(weight, BlockedWeight):
        raise KernelError(f"the Triton kernels take dense and blocked weights, not {type(weight).__name__}")
    return weight


def num_blocks(columns: int) -> int:
    return -(-columns // BLOCK_COLUMNS)


class _DenseBuilder:
    def __init__(self, dtype: torch.dtype, rows: int, columns: int, device: torch.device) -> None:
        self._data = torch.empty(rows, columns, dtype=dtype, device=device)

    def write(self, row: int, block: Tensor) -> None:
        _check_columns(block, self._data.shape[1])
        self._data[row : row + len(block)].copy_(block)

    def write_quantized(self, row: int, qweight: Tensor, scales: Tensor) -> None:
        raise NotImplementedError("a dense weight takes floating-point rows")

    def build(self) -> Weight:
        return DenseWeight(data=self._data)


class _BlockedBuilder:
    """Rows are quantized and laid out on the device, from which other rows are not read."""

    def __init__(self, weight_format: WeightFormat, rows: int, columns: int, device: torch.device) -> None:
        self._format, self._columns, self._device = weight_format, columns, device
        is_int4 = weight_format is WeightFormat.INT4
        empty = partial(torch.empty, device=device)
        self._values = empty(
            num_blocks(columns),
            rows,
            _WORDS if is_int4 else BLOCK_COLUMNS,
            dtype=torch.int16 if is_int4 else torch.int8,
        )
        self._scales = empty(num_blocks(columns), rows, _GROUPS, dtype=torch.float16)
        self._row_scales = empty(rows, dtype=torch.float32)

    def write(self, row: int, block: Tensor) -> None:
        _check_columns(block, self._columns)
        self.write_quantized(row, *quantize_rows(block.to(self._device), self._format))

    def write_quantized(self, row: int, qweight: Tensor, scales: Tensor) -> None:
        value_columns, scale_columns = quantized_columns(self._format, self._columns)
        _check_columns(qweight, value_columns)
        _check_columns(scales, scale_columns)
        if len(qweight) != len(scales):
            raise ShapeError(f"{len(qweight)} rows of values, {len(scales)} of scales")
        if not torch.isfinite(scales).all():
            raise KernelError("a quantized weight has a scale that is NaN or infinite")
        rows = slice(row, row + len(qweight))
        scales = scales.to(self._device, torch.float32)
        row_scales = _powers_of_two(scales)
        halves = _padded(scales / row_scales[:, None], num_blocks(self._columns) * _GROUPS, 0)
        self._row_scales[rows] = row_scales
        self._scales[:, rows] = _in_blocks(halves.half(), _GROUPS)
        self._values[:, rows] = self._blocks(qweight.to(self._device))

    def build(self) -> Weight:
        return BlockedWeight(
            weight_format=self._format,
            in_features=self._columns,
            values=self._values,
            scales=self._scales,
            row_scales=self._row_scales,
        )

    def _blocks(self, qweight: Tensor) -> Tensor:
        padded_columns = num_blocks(self._columns) * BLOCK_COLUMNS
        if self._format is WeightFormat.INT8:
            return _in_blocks(_padded(qweight, padded_columns, 0), BLOCK_COLUMNS)
        nibbles = torch.stack((qweight & 15, qweight >> 4), dim=-1).flatten(1)
        # A last nibble that only fills a byte is no column, but may be anything: x has zeros there.
        words = _in_blocks(_padded(nibbles, padded_columns, 8), BLOCK_COLUMNS).unflatten(2, (_NIBBLES, _WORDS)).int()
        shifts = 4 * torch.arange(_NIBBLES, device=words.device, dtype=torch.int32)
        blocks: Tensor = (words << shifts[:, None]).sum(dim=2).to(torch.int16)
        return blocks


def _powers_of_two(scales: Tensor) -> Tensor:
    """[n]: 2^e with the largest |scale| of each row in [2^e, 2^(e + 1)); 1 for rows of zeros."""
    largest = scales.abs().amax(dim=1) if scales.shape[1] else scales.new_zeros(len(scales))
    # frexp: largest = mantissa * 2^exponent with a mantissa in [0.5, 1).
    exponents = torch.frexp(torch.where(largest == 0, 1.0, largest)).exponent - 1
    # The bits of a float32: a device's pow need not be exact.
    bits: Tensor = ((exponents.clamp(min=-126) + 127) << 23).to(torch.int32)
    return bits.view(torch.float32)


def _padded(rows: Tensor, columns: int, value: int) -> Tensor:
    return torch.nn.functional.pad(rows, (0, columns - rows.shape[1]), value=value)


def _in_blocks(rows: Tensor, columns: int) -> Tensor:
    """[n, blocks * columns] as [blocks, n, columns]."""
    blocks: Tensor = rows.unflatten(1, (rows.shape[1] // columns, columns))
    return blocks.transpose(0, 1)


def _check_columns(block: Tensor, columns: int) -> None:
    if block.dim() != 2 or block.shape[1] != columns:
        raise ShapeError(f"a block of shape {list(block.shape)} for rows of {columns} columns")


def as_quantized(weight: BlockedWeight) -> QuantizedWeight:
    """The same integers and scales in rows, for tests and tools."""
    is_int4 = weight.weight_format is WeightFormat.INT4
    values = weight.values
    if is_int4:
        shifts = 4 * torch.arange(_NIBBLES, device=values.device, dtype=torch.int32)
        values = ((values.int()[:, :, None] >> shifts[:, None]) & 15).flatten(2).to(torch.uint8)
    q = values.transpose(0, 1).flatten(1)
    value_columns, scale_columns = quantized_columns(weight.weight_format, weight.in_features)
    if is_int4:
        q = q[:, 0::2] | (q[:, 1::2] << 4)
    scales = weight.scales.float().transpose(0, 1).flatten(1) * weight.row_scales[:, None]
    return QuantizedWeight(
        weight_format=weight.weight_format,
        qweight=q[:, :value_columns],
        scales=scales[:, :scale_columns],
        in_features=weight.in_features,
    )
