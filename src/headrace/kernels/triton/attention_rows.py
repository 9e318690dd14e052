"""Which positions each row of attention sees, as positions of the cache it looks into."""

import triton
import triton.language as tl

NO_WINDOW = 2**30
"""A window longer than any context; positions less it still fit an int32."""

UNSPECIALIZED = ("num_seqs", "table_stride", "owned_stride", "max_splits", "window")
UNALIGNED = ("tables_ptr", "context_lens_ptr", "bounds_ptr", "owned_ptr")
"""What differs from batch to batch, for which no kernel shall be compiled anew while requests wait."""

_NEVER: tl.constexpr = tl.constexpr(2**30)


@triton.jit
def visible_positions(i, num_tokens, context_len, window, owned_ptr, HEADS: tl.constexpr):
    """[start, stop) that token i of the last num_tokens of a context sees; any shape.

    Where ranks share contexts, only the positions of blocks that this rank holds count: owned_ptr is the sequence's row
    of owned_blocks.
    """
    stop = context_len - num_tokens + i + 1
    start = tl.maximum(stop - window, 0)
    if HEADS.is_share:
        start = num_owned(start, owned_ptr, HEADS.block_size)
        stop = num_owned(stop, owned_ptr, HEADS.block_size)
    return start, stop


@triton.jit
def num_owned(position, owned_ptr, BLOCK_SIZE: tl.constexpr):
    """How many of a sequence's first `position` tokens this rank holds."""
    block = position // BLOCK_SIZE
    rest = position % BLOCK_SIZE
    before = tl.load(owned_ptr + block)
    # The last entry counts all blocks; nothing lies behind it to be asked for.
    after = tl.load(owned_ptr + block + (rest > 0).to(tl.int32))
    return before * BLOCK_SIZE + tl.where(after > before, rest, 0)


@triton.jit
def row_ranges(tokens, is_row, num_tokens, context_len, window, owned_ptr, HEADS: tl.constexpr):
    """`visible_positions` of the rows of a tile; where there is no row, nothing."""
    start, stop = visible_positions(tl.where(is_row, tokens, 0), num_tokens, context_len, window, owned_ptr, HEADS)
    return tl.where(is_row, start, _NEVER), tl.where(is_row, stop, 0)
