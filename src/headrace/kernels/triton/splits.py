"""Where contexts are split: at positions that depend on nothing but the head and the format of the cache.

So a row's bits depend neither on the batch it is in nor on how many programs share its splits. In units of a fixed
number of tokens, splits have one unit up to the 32nd, then two up to the 64th, four up to the 128th, and so on: a
context of n units has about 16 log2(n / 8) of them, each at most n / 16 long. Partial results so stay small beside what
is read (112 for each row at 128k tokens of 128 to the unit), and one sequence has enough splits to occupy a GPU.
"""

import triton
import triton.language as tl

from headrace.config import KvCacheFormat

_MAX_DOUBLINGS: tl.constexpr = tl.constexpr(18)
"""Units beyond 2^22 lie in splits of 2^18 units: longer contexts than any model's."""


def split_unit_tokens(cache_format: KvCacheFormat, head_dim: int) -> int:
    """Tokens of a unit: 64 KiB of keys and values of one head of 128 in bfloat16, two tiles of `decode_tiles`.

    As many bytes as a program has on their way at once, so that all of a short context is asked for at the start: by
    Little's law an H100 needs 3.35 TB/s * 0.7 us / 132 = 18 KB in flight on each SM, and has 128 KiB by two programs.
    And as few tokens as it takes to occupy all SMs: 4,096 tokens of 8 KV heads are 32 * 8 = 256 pieces of work for the
    264 programs of a launch. Twice as many tokens would leave one program to an SM, half as many would give each piece
    a single tile, and its program nothing to ask for while it waits.
    """
    return 64 if cache_format is KvCacheFormat.FLOAT32 or head_dim > 128 else 128


def max_num_splits(num_tokens: int, unit: int) -> int:
    """Splits of a context of so many tokens, on the host."""
    last = max(num_tokens - 1, 0) // unit
    doublings = max(last.bit_length() - 5, 0)
    return 16 * doublings + (last >> doublings) + 1


@triton.jit
def split_of(unit):
    """The split that a unit lies in; any shape, int32."""
    doublings = unit * 0
    for i in tl.static_range(_MAX_DOUBLINGS):
        doublings += (unit >= (32 << i)).to(tl.int32)
    return 16 * doublings + (unit >> doublings)


@triton.jit
def split_begin(split):
    """The first unit of a split; any shape, int32."""
    doublings = tl.maximum(split // 16 - 1, 0)
    return (split - 16 * doublings) << doublings
