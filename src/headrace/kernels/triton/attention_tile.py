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
def load_queries(query_ptr, tokens, heads, is_row, token_stride, HEADS: tl.constexpr):
    """Queries [rows, BLOCK_D], zeros where there is no row and past head_dim."""
    d = tl.arange(0, HEADS.block_d)
    at = tokens.to(tl.int64)[:, None] * token_stride + heads[:, None] * HEADS.head_dim + d[None, :]
    return tl.load(query_ptr + at, mask=is_row[:, None] & (d < HEADS.head_dim)[None, :], other=0.0)


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
    cache,
    logits,
    HEADS: tl.constexpr,
    SOFTMAX: tl.constexpr,
    BLOCK_N: tl.constexpr,
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
    """
    d = tl.arange(0, HEADS.block_d)
    is_entry = (d < HEADS.head_dim)[None, :]
    first = tl.min(row_start, axis=0) if IS_MASKED else begin
    # A tile ahead: what is loaded through an address that was itself just loaded cannot be under way early.
    blocks = _blocks(table_ptr, begin + tl.arange(0, BLOCK_N), first, end, HEADS.block_size)
    for start in tl.range(begin, end, BLOCK_N, num_stages=STAGES):
        positions = start + tl.arange(0, BLOCK_N)
        is_read = (positions >= first) & (positions < end)
        entry_mask = (is_read[:, None] & is_entry) if IS_MASKED else is_entry
        # Entries of a cache may be more than 2^31.
        slots = (blocks.to(tl.int64) * HEADS.num_kv_heads + kv_head) * HEADS.block_size + positions % HEADS.block_size
        at = slots[:, None] * HEADS.head_dim + d[None, :]
        blocks = _blocks(table_ptr, positions + BLOCK_N, first, end, HEADS.block_size)
        k = tl.load(cache.keys_ptr + at, mask=entry_mask, other=0).to(q.dtype)
        t = tl.dot(q, tl.trans(k), input_precision="ieee") * logits.scale2
        if HEADS.is_int8:
            t *= tl.load(cache.key_scales_ptr + slots, mask=is_read, other=0.0)[None, :]
        if SOFTMAX.has_cap:
            t = soft_cap(t, logits.cap2)
        if IS_MASKED:
            is_seen = (positions[None, :] >= row_start[:, None]) & (positions[None, :] < row_stop[:, None])
            t = tl.where(is_seen, t, float("-inf"))
        if SOFTMAX.scheme == ASYNCHRONIZED:
            p = tl.exp2(t - logits.unified_max2)
            summed = p
            if SOFTMAX.is_strict:
                # NaN in a sum is what `is_sound` notices.
                summed = tl.where(is_outside(t, logits.unified_max2, logits.least2, logits.largest2), float("nan"), p)
        else:
            m, sums, acc = raised(m, sums, acc, t, SOFTMAX.scheme)
            p = tl.exp2(t - reference_of(m)[:, None])
            summed = p
        sums += tl.sum(summed, axis=1) if SUMS_ROWS else summed
        v = tl.load(cache.values_ptr + at, mask=entry_mask, other=0).to(q.dtype)
        if HEADS.is_int8:
            p *= tl.load(cache.value_scales_ptr + slots, mask=is_read, other=0.0)[None, :]
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
