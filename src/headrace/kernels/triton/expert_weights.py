"""The weights of a mixture's experts, where they are: tables of addresses on the device, and how a tile is read."""

from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
import triton
import triton.language as tl
from torch import Tensor

from headrace.config import WeightFormat
from headrace.errors import KernelError
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


@triton.jit
def load_weight_tile(
    values_address,
    scales_address,
    row_scales_address,
    rows,
    columns_begin,
    num_rows,
    num_columns,
    DTYPE: tl.constexpr,
    NUM_BITS: tl.constexpr,
    IS_ALIGNED: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """[len(rows), BLOCK_K] of one expert's matrix [num_rows, num_columns] in DTYPE, zeros past its ends.

    An integer times its scale is rounded to DTYPE once. Reads 16 bytes at a time where all rows begin at multiples.
    """
    columns = columns_begin + tl.arange(0, BLOCK_K)
    is_row = (rows < num_rows)[:, None]
    row = rows.to(tl.int64)[:, None]
    if NUM_BITS == 0:
        dense_ptr = values_address.to(tl.pointer_type(DTYPE))
        if IS_ALIGNED:
            dense_ptr = tl.multiple_of(dense_ptr, 16)
        is_inside = is_row & (columns < num_columns)[None, :]
        weights = tl.load(dense_ptr + row * num_columns + columns[None, :], mask=is_inside, other=0.0)
    else:
        # Blocks of 64 columns (`BlockedWeight`) are whole, and a step is one or half of one.
        block = (columns // 64).to(tl.int64)[None, :] * num_rows + row
        if NUM_BITS == 8:
            bytes_ptr = values_address.to(tl.pointer_type(tl.int8))
            if IS_ALIGNED:
                bytes_ptr = tl.multiple_of(bytes_ptr, 16)
            q = tl.load(bytes_ptr + block * 64 + (columns % 64)[None, :], mask=is_row, other=0).to(tl.int32)
        else:
            words_ptr = values_address.to(tl.pointer_type(tl.int16))
            if IS_ALIGNED:
                words_ptr = tl.multiple_of(words_ptr, 16)
            words = tl.load(words_ptr + block * 16 + (columns % 16)[None, :], mask=is_row, other=0).to(tl.int32)
            q = ((words >> (columns // 16 % 4 * 4)[None, :]) & 15) - 8
        groups = columns_begin // GROUP + tl.arange(0, BLOCK_K // GROUP)
        scale_ptr = scales_address.to(tl.pointer_type(tl.float16))
        places = ((groups // 2).to(tl.int64)[None, :] * num_rows + row) * 2 + (groups % 2)[None, :]
        row_scales = tl.load(row_scales_address.to(tl.pointer_type(tl.float32)) + row, mask=is_row, other=0.0)
        scales = tl.load(scale_ptr + places, mask=is_row, other=0.0).to(tl.float32) * row_scales
        grouped = tl.reshape(q, (rows.shape[0], BLOCK_K // GROUP, GROUP)).to(tl.float32) * scales[:, :, None]
        weights = tl.reshape(grouped, (rows.shape[0], BLOCK_K)).to(DTYPE)
    return weights


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
