"""The paged KV cache of one layer, as kernels hold it. Only they know how keys and values lie in it."""

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from torch import Tensor

from headrace.config import KvCacheFormat

if TYPE_CHECKING:
    from headrace import _native


NOT_STORED = -(2**63)
"""The slot of a token whose key and value another rank keeps. Not -1, which a missing block gives at its end."""


@dataclass(frozen=True, kw_only=True)
class KvCacheSpec:
    """block_size: tokens per block. Slot block_id * block_size + offset holds one token."""

    cache_format: KvCacheFormat
    num_blocks: int
    block_size: int
    num_kv_heads: int
    head_dim: int

    @property
    def num_slots(self) -> int:
        return self.num_blocks * self.block_size


@dataclass(frozen=True, kw_only=True)
class SoftmaxCounts:
    """Rows (a query of one head each) that the asynchronized softmax computed over a cache since it was made, and how
    many of them a second time."""

    num_rows: int = 0
    num_recomputed_rows: int = 0

    def since(self, earlier: "SoftmaxCounts") -> "SoftmaxCounts":
        return SoftmaxCounts(
            num_rows=self.num_rows - earlier.num_rows,
            num_recomputed_rows=self.num_recomputed_rows - earlier.num_recomputed_rows,
        )


@dataclass(frozen=True, kw_only=True)
class DenseKvCache:
    """Shapes: data [2, num_blocks, block_size, num_kv_heads, head_dim], keys then values, float32 or bfloat16."""

    spec: KvCacheSpec
    data: Tensor

    def softmax_counts(self) -> SoftmaxCounts:
        return SoftmaxCounts()


@dataclass(frozen=True, kw_only=True)
class QuantizedKvCache:
    """x[d] is about scale * q[d], with one scale for each token and KV head.

    Shapes:
        data:   [2, num_blocks, block_size, num_kv_heads, head_dim] int8, keys then values
        scales: [2, num_blocks, block_size, num_kv_heads] float32; NaN for a token whose key or value is not finite
    """

    spec: KvCacheSpec
    data: Tensor
    scales: Tensor

    def softmax_counts(self) -> SoftmaxCounts:
        return SoftmaxCounts()


@dataclass(frozen=True, kw_only=True)
class PackedKvCache:
    """A cache in the layout of the native kernels (native/kv_cache.h), which own its memory and alone can read it."""

    spec: KvCacheSpec
    cache: "_native.KvCache"

    def softmax_counts(self) -> SoftmaxCounts:
        return SoftmaxCounts(num_rows=self.cache.num_rows(), num_recomputed_rows=self.cache.num_recomputed_rows())


@dataclass(frozen=True, kw_only=True)
class GpuKvCache:
    """A cache in the layout of the Triton kernels: what one KV head has of a block lies side by side.

    A key or value that is not finite makes its token one that whoever sees it gets NaN from, and whoever does not is
    not touched by: its scales are NaN; in a cache without scales its key is NaN and its value 0.

    Shapes:
        data:   [2, num_blocks, num_kv_heads, block_size, head_dim] float32, bfloat16 or int8, keys then values
        scales: [2, num_blocks, num_kv_heads, block_size] float32 for int8, else empty
        counts: [2] int64, rows and recomputed rows of the asynchronized softmax
    """

    spec: KvCacheSpec
    data: Tensor
    scales: Tensor
    counts: Tensor

    @cached_property
    def keys_and_values(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Keys, values, the scales of the keys and of the values: views that every launch takes, made once."""
        keys, values = self.data
        key_scales, value_scales = self.scales
        return keys, values, key_scales, value_scales

    def softmax_counts(self) -> SoftmaxCounts:
        """Waits for the device."""
        num_rows, num_recomputed_rows = self.counts.tolist()
        return SoftmaxCounts(num_rows=num_rows, num_recomputed_rows=num_recomputed_rows)


KvCache = DenseKvCache | QuantizedKvCache | PackedKvCache | GpuKvCache
