"""Weight matrices as kernels hold them, and the builder that fills one row block by row block while loading."""

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from headrace.config import WeightFormat
from headrace.kernels.mixture_tuning import MixtureShape
from headrace.kernels.tuning import LinearShape

if TYPE_CHECKING:
    from headrace._native import PackedMatrix

QUANTIZATION_GROUP_SIZE = 32
"""Consecutive entries along K that share one scale."""

BLOCK_COLUMNS = 64
"""Of a `BlockedWeight`: two groups."""


@dataclass(frozen=True, kw_only=True)
class DenseWeight:
    """Shapes: data [N, K], float32 or bfloat16."""

    data: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        return self.data.shape[0], self.data.shape[1]

    @property
    def num_bytes(self) -> int:
        return self.data.nbytes

    @cached_property
    def linear_shape(self) -> LinearShape:
        """float16, which has no format of its own, counts as bfloat16."""
        is_wide = self.data.dtype == torch.float32
        return LinearShape(
            weight_format=WeightFormat.FLOAT32 if is_wide else WeightFormat.BFLOAT16,
            out_features=self.shape[0],
            in_features=self.shape[1],
        )


@dataclass(frozen=True, kw_only=True)
class QuantizedWeight:
    """w[n, k] is about scales[n, k // QUANTIZATION_GROUP_SIZE] * q[n, k], symmetric (no zero point).

    Shapes:
        qweight: int8: [N, K] int8. int4: [N, ceil(K / 2)] uint8, entry k = 2j in the low and 2j + 1 in the high nibble
            of byte j, stored as q + 8.
        scales: [N, ceil(K / QUANTIZATION_GROUP_SIZE)] float32
    """

    weight_format: WeightFormat
    qweight: Tensor
    scales: Tensor
    in_features: int

    @property
    def shape(self) -> tuple[int, int]:
        return self.qweight.shape[0], self.in_features

    @property
    def num_bytes(self) -> int:
        return self.qweight.nbytes + self.scales.nbytes


@dataclass(frozen=True, kw_only=True)
class PackedWeight:
    """A weight in the layout of the native kernels, which own its memory and alone can read it.

    num_bytes: padding and scales included.
    """

    weight_format: WeightFormat
    shape: tuple[int, int]
    num_bytes: int
    matrix: "PackedMatrix"

    @cached_property
    def linear_shape(self) -> LinearShape:
        return LinearShape(weight_format=self.weight_format, out_features=self.shape[0], in_features=self.shape[1])


@dataclass(frozen=True, kw_only=True)
class BlockedWeight:
    """A quantized weight in the layout of the Triton kernels: BLOCK_COLUMNS columns of all rows, then the next ones.

    w[n, k] is row_scales[n] * scales[b, n, g] * q with b = k // 64 and g = k % 64 // 32: `QuantizedWeight` with each
    scale in float16 and a power of two for each row, which brings the largest of its scales into [1, 2). Scales of
    `quantize_rows` stay as they are down to 2^-21 of that; others are off by at most 2^-11 of themselves or 2^-25 of
    the row's largest one. K is filled up with zeros.

    A block is what one step of a kernel multiplies, 32 or 64 bytes of a row beside those of the next row, so that a
    warp reads whole lines. Four nibbles of a word lie 16 columns apart: all words' nibble p is a piece of 16 columns,
    which tensor cores take at once, and unpacking needs no exchange between lanes.

    Shapes:
        values: int8: [blocks, N, 64] int8, entry j is column 64 b + j. int4: [blocks, N, 16] int16, nibble p (bits 4 p
            and up) of word j is column 64 b + 16 p + j, stored as q + 8.
        scales: [blocks, N, 2] float16
        row_scales: [N] float32
    """

    weight_format: WeightFormat
    in_features: int
    values: Tensor
    scales: Tensor
    row_scales: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        return self.row_scales.shape[0], self.in_features

    @property
    def num_bytes(self) -> int:
        return self.values.nbytes + self.scales.nbytes + self.row_scales.nbytes

    @property
    def is_int4(self) -> bool:
        return self.weight_format is WeightFormat.INT4

    @property
    def values_per_item(self) -> int:
        return 4 if self.is_int4 else 1

    @cached_property
    def scale_pairs(self) -> Tensor:
        """[blocks, N, 1] int32: both scales of a block as one word."""
        return self.scales.view(torch.int32)

    @cached_property
    def linear_shape(self) -> LinearShape:
        return LinearShape(weight_format=self.weight_format, out_features=self.shape[0], in_features=self.in_features)


Weight = DenseWeight | QuantizedWeight | PackedWeight | BlockedWeight


def quantized_columns(weight_format: WeightFormat, in_features: int) -> tuple[int, int]:
    """Columns of `qweight` and of `scales` for a weight with K = in_features."""
    qweight = -(-in_features // 2) if weight_format is WeightFormat.INT4 else in_features
    return qweight, -(-in_features // QUANTIZATION_GROUP_SIZE)


@dataclass(frozen=True, kw_only=True, eq=False)
class Experts:
    """The gated feed-forward layers of a mixture, all of one shape. Equal to itself alone.

    Shapes: up: each [2 * intermediate_size, hidden_size], gate first; down: each [hidden_size, intermediate_size].
    """

    up: tuple[Weight, ...]
    down: tuple[Weight, ...]

    def mixture_shape(self, dtype: torch.dtype) -> MixtureShape:
        """What measurements of these experts, with activations of this dtype, are kept under."""
        up = self.up[0]
        assert not isinstance(up, QuantizedWeight), "the reference has nothing to measure"
        return MixtureShape(
            weight_format=up.linear_shape.weight_format,
            activation_bytes=dtype.itemsize,
            num_experts=len(self.up),
            hidden_size=up.shape[1],
            intermediate_size=up.shape[0] // 2,
        )


class WeightBuilder(Protocol):
    """Allocates a weight once and takes its rows in blocks of any size, so that loading never holds two copies."""

    def write(self, row: int, block: Tensor) -> None:
        """Store floating-point rows [row, row + len(block)), quantizing them if the format says so."""
        ...

    def write_quantized(self, row: int, qweight: Tensor, scales: Tensor) -> None:
        """Store rows that are already in this builder's format."""
        ...

    def build(self) -> Weight: ...
