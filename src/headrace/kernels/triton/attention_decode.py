"""Attention of one new token per sequence, or a few, with each context split over programs.

Two kernels, or three. The first is launched as many programs as fill the GPU, whatever the batch: each finds out on
the device which splits of which sequences there are, and takes its share of them. So a launch depends on nothing that
the host does not know, as a CUDA graph requires, and where contexts may be long no programs are launched in vain for
short ones. The second merges each row's splits in order, and tests the rows of the asynchronized scheme; for that
scheme alone, a third computes again, and counts, those that failed. Nothing waits for the host.

What takes how long on an H100 (3.35 TB/s, 132 SMs, about 0.7 us from a load to its data). One sequence of 4,096
tokens: Llama-2-7B's 32 KV heads are 67 MB, 20 us; Llama-3-8B's 8 are 17 MB, 5 us, and there loads that wait for one
another, and a launch in a graph of about 1 us, weigh as much as the reading:

    what the batch holds, a tile's blocks, its keys and values        3 loads, then 5 us of reading
    a launch, what the batch holds, all references, all numerators    1 us and 3 loads

A piece of work has all of its bytes on their way at once (`splits.split_unit_tokens`), and so has the merge up to 32
splits (`attention_merge`); in 8 splits at a time it waited 8 times, as long as for the keys and values. It stays a
launch of its own: for the last program to arrive to merge would spare 1 us, and let it wait for an atomic, take the
rows of a group after one another or with their registers, and leave the zeros of places without a sequence to somebody
else.

Partial results, for each row and split: numerators [head_dim], reference and denominator, (head_dim + 2) * 4 bytes.
64 sequences of 32 heads of 128, with room for 32k tokens in their block tables, take 85 MB, whatever their lengths.
"""

import triton
import triton.language as tl

from headrace.kernels.triton.attention_arguments import Batch, KeysAndValues, LogitNumbers, Partials
from headrace.kernels.triton.attention_rows import UNALIGNED, UNSPECIALIZED, row_ranges, visible_positions
from headrace.kernels.triton.attention_tile import attend, load_queries
from headrace.kernels.triton.softmax import ASYNCHRONIZED
from headrace.kernels.triton.splits import split_begin, split_of


@triton.jit(do_not_specialize=UNSPECIALIZED, do_not_specialize_on_alignment=UNALIGNED)
def split_kernel(
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
    partials_ptr,
    states_ptr,
    num_seqs,
    query_stride,
    table_stride,
    owned_stride,
    max_splits,
    window,
    scale2,
    cap2,
    unified_max2,
    least2,
    largest2,
    SEQS: tl.constexpr,
    HEADS: tl.constexpr,
    SOFTMAX: tl.constexpr,
    SHAPE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TOKEN_SLOTS: tl.constexpr,
    UNIT: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Sequences of at most SHAPE.max_tokens new tokens: their splits, the last ones, which are the longest, first."""
    batch = Batch(tables_ptr, table_stride, context_lens_ptr, bounds_ptr, owned_ptr, owned_stride, window)
    cache = KeysAndValues(keys_ptr, values_ptr, key_scales_ptr, value_scales_ptr)
    logits = LogitNumbers(scale2, cap2, unified_max2, least2, largest2)
    partials = Partials(partials_ptr, states_ptr, max_splits)
    seqs = tl.arange(0, SEQS)
    is_seq = seqs < num_seqs
    num_tokens = tl.load(bounds_ptr + seqs + 1, mask=is_seq, other=0) - tl.load(bounds_ptr + seqs, mask=is_seq, other=0)
    context_lens = tl.load(context_lens_ptr + seqs, mask=is_seq, other=0)
    is_ours = (num_tokens > 0) & (num_tokens <= SHAPE.max_tokens) & (context_lens > 0)
    context_lens = tl.where(is_ours, context_lens, 0)
    num_tokens = tl.where(is_ours, num_tokens, 0)
    owned = owned_ptr + tl.where(is_seq, seqs, 0) * owned_stride
    begins, _ = visible_positions(0, num_tokens, context_lens, window, owned, HEADS)
    _, ends = visible_positions(num_tokens - 1, num_tokens, context_lens, window, owned, HEADS)
    first_splits = split_of(begins // UNIT)
    num_splits = split_of(tl.maximum(ends - 1, 0) // UNIT) + 1 - first_splits
    num_splits = tl.where(is_ours & (ends > begins), num_splits, 0)
    ends_at = tl.cumsum(num_splits, axis=0)
    total_splits = tl.sum(num_splits, axis=0)
    num_pieces = total_splits * (HEADS.num_kv_heads * SHAPE.row_tiles)
    program = tl.program_id(0)
    num_programs = tl.num_programs(0)
    if (SOFTMAX.scheme == ASYNCHRONIZED) & (program == 0):
        tl.atomic_add(counts_ptr, tl.sum(num_tokens, axis=0).to(tl.int64) * HEADS.num_heads, sem="relaxed")
    for i in range(0, tl.cdiv(num_pieces, num_programs)):
        # To and fro: who got a long one first gets a short one then.
        piece = i * num_programs + tl.where(i % 2 == 0, program, num_programs - 1 - program)
        if piece < num_pieces:
            index = total_splits - 1 - piece // (HEADS.num_kv_heads * SHAPE.row_tiles)
            seq = tl.sum((ends_at <= index).to(tl.int32), axis=0)
            before = tl.sum(tl.where(seqs == seq, ends_at - num_splits - first_splits, 0), axis=0)
            attend_split(
                seq,
                index - before,
                piece % HEADS.num_kv_heads,
                piece // HEADS.num_kv_heads % SHAPE.row_tiles,
                -1,
                query_ptr,
                query_stride,
                batch,
                cache,
                logits,
                partials,
                HEADS,
                SOFTMAX,
                SHAPE,
                BLOCK_N,
                TOKEN_SLOTS,
                UNIT,
                STAGES,
            )


@triton.jit
def attend_split(
    seq,
    split,
    kv_head,
    row_tile,
    only_row,
    query_ptr,
    query_stride,
    batch,
    cache,
    logits,
    partials,
    HEADS: tl.constexpr,
    SOFTMAX: tl.constexpr,
    SHAPE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TOKEN_SLOTS: tl.constexpr,
    UNIT: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Partial results of a tile of rows over one split; of only_row alone if that is not negative."""
    BLOCK_M: tl.constexpr = SHAPE.block_m
    BLOCK_D: tl.constexpr = HEADS.block_d
    first_token = tl.load(batch.bounds_ptr + seq)
    num_tokens = tl.load(batch.bounds_ptr + seq + 1) - first_token
    context_len = tl.load(batch.context_lens_ptr + seq)
    rows = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    is_row = rows < num_tokens * HEADS.group
    tokens = rows // HEADS.group
    heads = kv_head * HEADS.group + rows % HEADS.group
    owned_ptr = batch.owned_ptr + seq.to(tl.int64) * batch.owned_stride
    row_start, row_stop = row_ranges(tokens, is_row, num_tokens, context_len, batch.window, owned_ptr, HEADS)
    begin = tl.maximum(split_begin(split) * UNIT, tl.min(row_start, axis=0) // BLOCK_N * BLOCK_N)
    end = tl.minimum(split_begin(split + 1) * UNIT, tl.max(row_stop, axis=0))
    m, sums, acc = attend(
        load_queries(query_ptr, first_token + tokens, heads, is_row, query_stride, HEADS),
        tl.full([BLOCK_M], float("-inf"), tl.float32),
        tl.zeros([BLOCK_M, BLOCK_N], tl.float32),
        tl.zeros([BLOCK_M, BLOCK_D], tl.float32),
        begin,
        end,
        row_start,
        row_stop,
        kv_head,
        batch.tables_ptr + seq.to(tl.int64) * batch.table_stride,
        cache,
        logits,
        HEADS,
        SOFTMAX,
        BLOCK_N,
        IS_MASKED=True,
        SUMS_ROWS=False,
        STAGES=STAGES,
    )
    is_stored = is_row & (rows == tl.where(only_row < 0, rows, only_row))
    row = (seq.to(tl.int64) * TOKEN_SLOTS + tokens) * HEADS.num_heads + heads
    to = row * partials.max_splits + split
    d = tl.arange(0, BLOCK_D)
    is_entry = is_stored[:, None] & (d < HEADS.head_dim)[None, :]
    tl.store(partials.numerators_ptr + to[:, None] * HEADS.head_dim + d[None, :], acc, mask=is_entry)
    tl.store(partials.states_ptr + to * 2, m, mask=is_stored)
    tl.store(partials.states_ptr + to * 2 + 1, tl.sum(sums, axis=1), mask=is_stored)
