"""Attention of a chunk of a prompt: tiles of its tokens and of the heads that share a KV head, over all they see.

One program for each tile and KV head, launched as many as there can be; which sequences and tiles there are, each finds
out on the device, the last tiles, which see most, first. Positions that every row of a tile sees are taken without
masks; those of the diagonal, and of a window's first tiles, with them.

Rows of the asynchronized scheme are tested after their sums. A second launch of the kernel, for that scheme alone,
then computes those that failed again, synchronized, and counts them; where a tile has none, its program ends at once.
Were it the same program, it would hold the registers of both for as long as it runs.
"""

import triton
import triton.language as tl

from headrace.kernels.triton.attention_arguments import KeysAndValues, LogitNumbers
from headrace.kernels.triton.attention_rows import UNALIGNED, UNSPECIALIZED, visible_positions
from headrace.kernels.triton.attention_tile import attend, load_queries
from headrace.kernels.triton.softmax import ASYNCHRONIZED, is_sound


@triton.jit(do_not_specialize=UNSPECIALIZED, do_not_specialize_on_alignment=UNALIGNED)
def prefill_kernel(
    query_ptr,
    tables_ptr,
    context_lens_ptr,
    bounds_ptr,
    owned_ptr,
    keys_ptr,
    values_ptr,
    key_scales_ptr,
    value_scales_ptr,
    counts_ptr,
    unsound_ptr,
    out_ptr,
    normalizers_ptr,
    num_seqs,
    query_stride,
    table_stride,
    owned_stride,
    window,
    scale2,
    cap2,
    unified_max2,
    least2,
    largest2,
    SEQS: tl.constexpr,
    HEADS: tl.constexpr,
    SOFTMAX: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MAX_TOKENS: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    REPAIRS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Sequences of more than MAX_TOKENS new tokens; grid: tiles, KV heads.

    unsound_ptr: [num_tokens, num_heads]; the asynchronized scheme leaves 1 there for rows that must be computed again,
    0 for others. With REPAIRS, only those are computed.
    """
    cache = KeysAndValues(keys_ptr, values_ptr, key_scales_ptr, value_scales_ptr)
    logits = LogitNumbers(scale2, cap2, unified_max2, least2, largest2)
    seqs = tl.arange(0, SEQS)
    is_seq = seqs < num_seqs
    counts = tl.load(bounds_ptr + seqs + 1, mask=is_seq, other=0) - tl.load(bounds_ptr + seqs, mask=is_seq, other=0)
    num_tiles = tl.where(counts > MAX_TOKENS, (counts * HEADS.group + BLOCK_M - 1) // BLOCK_M, 0)
    ends_at = tl.cumsum(num_tiles, axis=0)
    index = tl.sum(num_tiles, axis=0) - 1 - tl.program_id(0)
    if index >= 0:
        seq = tl.sum((ends_at <= index).to(tl.int32), axis=0)
        tile = index - tl.sum(tl.where(seqs == seq, ends_at - num_tiles, 0), axis=0)
        kv_head = tl.program_id(1)
        first_token = tl.load(bounds_ptr + seq)
        num_tokens = tl.load(bounds_ptr + seq + 1) - first_token
        rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)
        is_row = rows < num_tokens * HEADS.group
        # Rows past the last see what the last token sees, so that they need no masks of their own.
        tokens = tl.minimum(rows // HEADS.group, num_tokens - 1)
        heads = kv_head * HEADS.group + rows % HEADS.group
        context_len = tl.load(context_lens_ptr + seq)
        owned = owned_ptr + seq.to(tl.int64) * owned_stride
        row_start, row_stop = visible_positions(tokens, num_tokens, context_len, window, owned, HEADS)
        row = (first_token + tokens).to(tl.int64) * HEADS.num_heads + heads
        if REPAIRS:
            is_row &= tl.load(unsound_ptr + row, mask=is_row, other=0) != 0
        num_rows = tl.sum(is_row.to(tl.int64), axis=0)
        if num_rows > 0:
            m, denominators, numerators = _attend_tile(
                load_queries(query_ptr, first_token + tokens, heads, is_row, query_stride, HEADS),
                row_start,
                row_stop,
                kv_head,
                tables_ptr + seq.to(tl.int64) * table_stride,
                cache,
                logits,
                HEADS,
                SOFTMAX,
                BLOCK_M,
                BLOCK_N,
                HAS_WINDOW,
                STAGES,
            )
            if REPAIRS:
                tl.atomic_add(counts_ptr + 1, num_rows, sem="relaxed")
            if SOFTMAX.scheme == ASYNCHRONIZED:
                tl.atomic_add(counts_ptr, num_rows, sem="relaxed")
                num_keys = row_stop - row_start
                m = tl.where(num_keys > 0, unified_max2, float("-inf"))
                is_unsound = (is_sound(numerators, denominators, num_keys, HEADS.is_int8) == 0) & (num_keys > 0)
                tl.store(unsound_ptr + row, is_unsound.to(tl.int32), mask=is_row)
            _store_rows(row, is_row, m, denominators, numerators, out_ptr, normalizers_ptr, HEADS)


@triton.jit
def _attend_tile(
    q,
    row_start,
    row_stop,
    kv_head,
    table_ptr,
    cache,
    logits,
    HEADS: tl.constexpr,
    SOFTMAX: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    STAGES: tl.constexpr,
):
    """References, denominators [rows] and numerators [rows, block_d] over all that the rows see."""
    BLOCK_D: tl.constexpr = HEADS.block_d
    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    sums = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    begin = tl.min(row_start, axis=0) // BLOCK_N * BLOCK_N
    end = tl.max(row_stop, axis=0)
    all_begin = begin
    if HAS_WINDOW:
        all_begin = (tl.max(row_start, axis=0) + BLOCK_N - 1) // BLOCK_N * BLOCK_N
    all_end = tl.maximum(tl.min(row_stop, axis=0) // BLOCK_N * BLOCK_N, all_begin)
    for part in tl.static_range(3):
        # Before, where, and after all rows see all positions; without a window nothing comes before.
        if (part > 0) | HAS_WINDOW:
            m, sums, acc = attend(
                q,
                m,
                sums,
                acc,
                begin if part == 0 else all_begin if part == 1 else all_end,
                tl.minimum(all_begin, end) if part == 0 else all_end if part == 1 else end,
                row_start,
                row_stop,
                kv_head,
                table_ptr,
                cache,
                logits,
                HEADS,
                SOFTMAX,
                BLOCK_N,
                IS_MASKED=part != 1,
                SUMS_ROWS=True,
                STAGES=STAGES,
            )
    return m, sums, acc


@triton.jit
def _store_rows(row, is_row, m, denominators, numerators, out_ptr, normalizers_ptr, HEADS: tl.constexpr):
    if HEADS.is_share:
        tl.store(normalizers_ptr + row * 2, denominators, mask=is_row)
        tl.store(normalizers_ptr + row * 2 + 1, m, mask=is_row)
    else:
        numerators = numerators / denominators[:, None]
    d = tl.arange(0, HEADS.block_d)
    is_entry = is_row[:, None] & (d < HEADS.head_dim)[None, :]
    tl.store(out_ptr + row[:, None] * HEADS.head_dim + d[None, :], numerators, mask=is_entry)
