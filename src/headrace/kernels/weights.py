"""Weight matrices as kernels hold them, and the builder that fills one row block by row block while loading."""

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Protocol

from torch import Tensor

from headrace.config import WeightFormat
from headrace.kernels.tuning import LinearShape

if TYPE_CHECKING:
    from headrace._native import PackedMatrix

QUANTIZATION_GROUP_SIZE = 32
"""Consecutive entries along K that share one scale."""


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


Weight = DenseWeight | QuantizedWeight | PackedWeight


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


class WeightBuilder(Protocol):
    """Allocates a weight once and takes its rows in blocks of any size, so that loading never holds two copies."""

    def write(self, row: int, block: Tensor) -> None:
        """Store floating-point rows [row, row + len(block)), quantizing them if the format says so."""
        ...

    def write_quantized(self, row: int, qweight: Tensor, scales: Tensor) -> None:
        """Store rows that are already in this builder's format."""
        ...

    def build(self) -> Weight: ...
