"""Attention of a tile of rows over a range of one sequence's positions: what all attention kernels have in common.

A row is one query of one head. Rows of a tile share a KV head, so that keys and values are read once for all of
them: row r is token r // group of the tile's tokens, query head kv_head * group + r % group. Positions are taken in
tiles that begin at multiples of their size; those that a row does not see take no part in what is computed for it, so
that its bits do not depend on the rows beside it.

Keys and values are read in rows of head_dim, 16 bytes to a thread, through the block table, and multiplied by tensor
cores in the query's type (float32 as float32). An int8 key is exact in that type; its scale multiplies the logit, and
that of a value the weight it meets, which is then rounded.
"""

import triton
import triton.language as tl

from headrace.kernels.triton.softmax import ASYNCHRONIZED, is_outside, raised, reference_of, soft_cap


@triton.jit
def load_queries(query_ptr, tokens, heads, is_row, token_stride, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Queries [rows, BLOCK_D], zeros where there is no row and past head_dim."""
    d = tl.arange(0, BLOCK_D)
    at = tokens.to(tl.int64)[:, None] * token_stride + heads[:, None] * HEAD_DIM + d[None, :]
    return tl.load(query_ptr + at, mask=is_row[:, None] & (d < HEAD_DIM)[None, :], other=0.0)


@triton.jit
def attend(
    q,
    m,
    sums,
    acc,
    begin,
    end,
    row_start,
    row_stop,
    kv_head,
    table_ptr,
    keys_ptr,
    values_ptr,
    key_scales_ptr,
    value_scales_ptr,
    scale2,
    cap2,
    unified_max2,
    least2,
    largest2,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    IS_INT8: tl.constexpr,
    SCHEME: tl.constexpr,
    HAS_CAP: tl.constexpr,
    IS_STRICT: tl.constexpr,
    IS_MASKED: tl.constexpr,
    SUMS_ROWS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Adds positions begin to end to the rows' state: references m [rows], sums of p, and numerators acc
    [rows, BLOCK_D].

    sums are [rows, BLOCK_N], each over one place of all tiles, which takes registers but no exchange between threads
    for each tile; or [rows] with SUMS_ROWS.

    Row r sees positions row_start[r] to row_stop[r]. begin is a multiple of BLOCK_N; without IS_MASKED so is end, and
    every row sees all. Positions that no row sees are not read.

    scale2, cap2, unified_max2, least2, largest2: for t, which is in base 2.
    """
    d = tl.arange(0, BLOCK_D)
    is_entry = (d < HEAD_DIM)[None, :]
    first = tl.min(row_start, axis=0) if IS_MASKED else begin
    # A tile ahead: what is loaded through an address that was itself just loaded cannot be under way early.
    blocks = _blocks(table_ptr, begin + tl.arange(0, BLOCK_N), first, end, BLOCK_SIZE)
    for start in tl.range(begin, end, BLOCK_N, num_stages=STAGES):
        positions = start + tl.arange(0, BLOCK_N)
        is_read = (positions >= first) & (positions < end)
        entry_mask = (is_read[:, None] & is_entry) if IS_MASKED else is_entry
        # Entries of a cache may be more than 2^31.
        slots = (blocks.to(tl.int64) * NUM_KV_HEADS + kv_head) * BLOCK_SIZE + positions % BLOCK_SIZE
        at = slots[:, None] * HEAD_DIM + d[None, :]
        blocks = _blocks(table_ptr, positions + BLOCK_N, first, end, BLOCK_SIZE)
        k = tl.load(keys_ptr + at, mask=entry_mask, other=0).to(q.dtype)
        t = tl.dot(q, tl.trans(k), input_precision="ieee") * scale2
        if IS_INT8:
            t *= tl.load(key_scales_ptr + slots, mask=is_read, other=0.0)[None, :]
        if HAS_CAP:
            t = soft_cap(t, cap2)
        if IS_MASKED:
            is_seen = (positions[None, :] >= row_start[:, None]) & (positions[None, :] < row_stop[:, None])
            t = tl.where(is_seen, t, float("-inf"))
        if SCHEME == ASYNCHRONIZED:
            p = tl.exp2(t - unified_max2)
            summed = p
            if IS_STRICT:
                # NaN in a sum is what `is_sound` notices.
                summed = tl.where(is_outside(t, unified_max2, least2, largest2), float("nan"), p)
        else:
            m, sums, acc = raised(m, sums, acc, t, SCHEME)
            p = tl.exp2(t - reference_of(m)[:, None])
            summed = p
        sums += tl.sum(summed, axis=1) if SUMS_ROWS else summed
        v = tl.load(values_ptr + at, mask=entry_mask, other=0).to(q.dtype)
        if IS_INT8:
            p *= tl.load(value_scales_ptr + slots, mask=is_read, other=0.0)[None, :]
            if IS_MASKED:
                # A scale of NaN is for those who see it.
                p = tl.where(is_seen, p, 0.0)
        acc = tl.dot(p.to(q.dtype), v, acc, input_precision="ieee")
    return m, sums, acc


@triton.jit
def _blocks(table_ptr, positions, first, end, BLOCK_SIZE: tl.constexpr):
    """The blocks of positions from first to end; 0 for others."""
    is_read = (positions >= first) & (positions < end)
    return tl.load(table_ptr + positions // BLOCK_SIZE, mask=is_read, other=0)
