"""How large the tiles of attention are, by the type they are computed in and the size of a head.

What bounds them is shared memory, 227 KiB an SM on H100 and H200, 163 KiB on A100 and 64 KiB a workgroup on MI300X,
where keys and values wait that are on their way, and the registers of a program's accumulators.
"""

from dataclasses import dataclass

import torch
import triton

from headrace.config import KvCacheFormat

_MAX_DECODED_TOKENS = 2
"""Each takes partial results for every sequence of a batch that has a prompt in it."""


@dataclass(frozen=True, kw_only=True)
class Tiles:
    """block_m: rows; block_n: positions; stages: of the software pipeline, one tile less than that is on its way."""

    block_m: int
    block_n: int
    stages: int
    num_warps: int


@dataclass(frozen=True, kw_only=True)
class DecodeShape:
    """What decides how rows lie in tiles.

    max_tokens: sequences of more new tokens than that are not decoded, but prefilled.
    """

    group: int
    block_m: int
    max_tokens: int

    @classmethod
    def of(cls, group: int) -> "DecodeShape":
        """Rows are at least as many as the tensor cores take at once; more than 64 are several tiles."""
        block_m = min(max(triton.next_power_of_2(group), 16), 64)
        return cls(group=group, block_m=block_m, max_tokens=min(max(block_m // group, 1), _MAX_DECODED_TOKENS))

    @property
    def row_tiles(self) -> int:
        return -(-self.group * self.max_tokens // self.block_m)


def decode_tiles(dtype: torch.dtype, head_dim: int, cache_format: KvCacheFormat) -> Tiles:
    """64 positions of 128 in bfloat16 are 32 KiB, and two such tiles on their way leave room for three programs an SM.

    int8 becomes the queries' type in registers, which half as many positions leave room for; three tiles are on their
    way then, but none for AMD, whose pipeliner in Triton 3.6 fails at the scales. Rows are as many as heads share a KV
    head, see `DecodeShape`.
    """
    if cache_format is KvCacheFormat.INT8:
        return Tiles(block_m=16, block_n=32, stages=1 if torch.version.hip else 4, num_warps=4)
    is_wide = head_dim * dtype.itemsize > 256
    num_warps = 8 if dtype is torch.float32 else 4
    return Tiles(block_m=16, block_n=32 if is_wide else 64, stages=2 if torch.version.hip else 3, num_warps=num_warps)


def prefill_tiles(dtype: torch.dtype, head_dim: int, cache_format: KvCacheFormat, *, has_warpgroups: bool) -> Tiles:
    """128 rows of bfloat16, a warpgroup's 64 for each four warps, and 64 positions: the most without registers spilled.

    A program's 8 warps have 255 registers a thread. Accumulators of 128 x 128 take 64 of them, and where warpgroups
    read both operands from shared memory (`has_warpgroup_products`) logits of 128 x 64 take 32 more. Elsewhere operands
    pass through registers too, and an int8 cache's become the queries' type there: half as many positions, or, with
    both, also half as many rows. A head of 256 has room for half of each. float32 is multiplied without tensor cores.

    AMD's pipeliner in Triton 3.6 fails at the scales of an int8 cache.
    """
    if dtype is torch.float32:
        return Tiles(block_m=32, block_n=32, stages=2, num_warps=8)
    is_int8, is_wide = cache_format is KvCacheFormat.INT8, head_dim > 128
    is_tight = is_int8 and not has_warpgroups
    block_n = 32 if is_wide or is_int8 or not has_warpgroups else 64
    stages = 3 if torch.version.hip is None else 1 if is_int8 else 2
    return Tiles(
        block_m=64 if is_wide or is_tight else 128,
        block_n=16 if is_wide and is_int8 else block_n,
        stages=stages,
        num_warps=8,
    )
