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
splits (`merged`); in 8 splits at a time it waited 8 times, as long as for the keys and values. It stays a launch of its
own: for the last program to arrive to merge would spare 1 us, and let it wait for an atomic, take the rows of a group
after one another or with their registers, and leave the zeros of places without a sequence to somebody else.

Partial results, for each row and split: numerators [head_dim], reference and denominator, (head_dim + 2) * 4 bytes.
64 sequences of 32 heads of 128, with room for 32k tokens in their block tables, take 85 MB, whatever their lengths.
"""

from dataclasses import dataclass

import triton
import triton.language as tl

from headrace.kernels.triton.attention_rows import UNALIGNED, UNSPECIALIZED, row_ranges, visible_positions
from headrace.kernels.triton.attention_tile import attend, load_queries
from headrace.kernels.triton.softmax import ASYNCHRONIZED, SYNCHRONIZED, is_sound, reference_of
from headrace.kernels.triton.splits import split_begin, split_of

_MERGED_AT_ONCE: tl.constexpr = tl.constexpr(8)
"""Splits that are summed as one: always so many, since how a sum is formed shows in its last bit.

Fewer than a tile has rows or positions: what is read in one kernel in tiles of one shape gets one layout from the
compiler, and so another order of the sum in `repair_kernel`, which reads queries too, than in `merge_kernel`.
"""

_MERGED_STAGES: tl.constexpr = tl.constexpr(5)
"""Of the loop over them: the 32 splits of 4,096 tokens are under way together, in 17 KiB of shared memory."""

_COMPARED_AT_ONCE: tl.constexpr = tl.constexpr(128)
"""Splits whose references are read at once, which is all of a context of up to 256k tokens."""

_MAX_DECODED_TOKENS = 2
"""Each takes partial results for every sequence of a batch that has a prompt in it."""


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
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ROW_TILES: tl.constexpr,
    MAX_TOKENS: tl.constexpr,
    TOKEN_SLOTS: tl.constexpr,
    UNIT: tl.constexpr,
    IS_INT8: tl.constexpr,
    IS_SHARE: tl.constexpr,
    SCHEME: tl.constexpr,
    HAS_CAP: tl.constexpr,
    IS_STRICT: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Sequences of at most MAX_TOKENS new tokens: their splits, the last ones, which are the longest, first."""
    seqs = tl.arange(0, SEQS)
    is_seq = seqs < num_seqs
    num_tokens = tl.load(bounds_ptr + seqs + 1, mask=is_seq, other=0) - tl.load(bounds_ptr + seqs, mask=is_seq, other=0)
    context_lens = tl.load(context_lens_ptr + seqs, mask=is_seq, other=0)
    is_ours = (num_tokens > 0) & (num_tokens <= MAX_TOKENS) & (context_lens > 0)
    context_lens = tl.where(is_ours, context_lens, 0)
    num_tokens = tl.where(is_ours, num_tokens, 0)
    owned = owned_ptr + tl.where(is_seq, seqs, 0) * owned_stride
    begins, _ = visible_positions(0, num_tokens, context_lens, window, owned, BLOCK_SIZE, IS_SHARE)
    _, ends = visible_positions(num_tokens - 1, num_tokens, context_lens, window, owned, BLOCK_SIZE, IS_SHARE)
    first_splits = split_of(begins // UNIT)
    num_splits = split_of(tl.maximum(ends - 1, 0) // UNIT) + 1 - first_splits
    num_splits = tl.where(is_ours & (ends > begins), num_splits, 0)
    ends_at = tl.cumsum(num_splits, axis=0)
    total_splits = tl.sum(num_splits, axis=0)
    num_pieces = total_splits * (NUM_KV_HEADS * ROW_TILES)
    program = tl.program_id(0)
    num_programs = tl.num_programs(0)
    if (SCHEME == ASYNCHRONIZED) & (program == 0):
        tl.atomic_add(counts_ptr, tl.sum(num_tokens, axis=0).to(tl.int64) * (NUM_KV_HEADS * GROUP), sem="relaxed")
    for i in range(0, tl.cdiv(num_pieces, num_programs)):
        # To and fro: who got a long one first gets a short one then.
        piece = i * num_programs + tl.where(i % 2 == 0, program, num_programs - 1 - program)
        if piece < num_pieces:
            index = total_splits - 1 - piece // (NUM_KV_HEADS * ROW_TILES)
            seq = tl.sum((ends_at <= index).to(tl.int32), axis=0)
            before = tl.sum(tl.where(seqs == seq, ends_at - num_splits - first_splits, 0), axis=0)
            attend_split(
                seq,
                index - before,
                piece % NUM_KV_HEADS,
                piece // NUM_KV_HEADS % ROW_TILES,
                -1,
                query_ptr,
                tables_ptr,
                context_lens_ptr,
                bounds_ptr,
                owned_ptr,
                keys_ptr,
                values_ptr,
                key_scales_ptr,
                value_scales_ptr,
                partials_ptr,
                states_ptr,
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
                NUM_KV_HEADS,
                GROUP,
                HEAD_DIM,
                BLOCK_D,
                BLOCK_SIZE,
                BLOCK_M,
                BLOCK_N,
                TOKEN_SLOTS,
                UNIT,
                IS_INT8,
                IS_SHARE,
                SCHEME,
                HAS_CAP,
                IS_STRICT,
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
    tables_ptr,
    context_lens_ptr,
    bounds_ptr,
    owned_ptr,
    keys_ptr,
    values_ptr,
    key_scales_ptr,
    value_scales_ptr,
    partials_ptr,
    states_ptr,
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
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TOKEN_SLOTS: tl.constexpr,
    UNIT: tl.constexpr,
    IS_INT8: tl.constexpr,
    IS_SHARE: tl.constexpr,
    SCHEME: tl.constexpr,
    HAS_CAP: tl.constexpr,
    IS_STRICT: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Partial results of a tile of rows over one split; of only_row alone if that is not negative."""
    first_token = tl.load(bounds_ptr + seq)
    num_tokens = tl.load(bounds_ptr + seq + 1) - first_token
    context_len = tl.load(context_lens_ptr + seq)
    rows = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    is_row = rows < num_tokens * GROUP
    tokens = rows // GROUP
    heads = kv_head * GROUP + rows % GROUP
    row_start, row_stop = row_ranges(
        tokens,
        is_row,
        num_tokens,
        context_len,
        window,
        owned_ptr + seq.to(tl.int64) * owned_stride,
        BLOCK_SIZE,
        IS_SHARE,
    )
    begin = tl.maximum(split_begin(split) * UNIT, tl.min(row_start, axis=0) // BLOCK_N * BLOCK_N)
    end = tl.minimum(split_begin(split + 1) * UNIT, tl.max(row_stop, axis=0))
    q = load_queries(query_ptr, first_token + tokens, heads, is_row, query_stride, HEAD_DIM, BLOCK_D)
    m, sums, acc = attend(
        q,
        tl.full([BLOCK_M], float("-inf"), tl.float32),
        tl.zeros([BLOCK_M, BLOCK_N], tl.float32),
        tl.zeros([BLOCK_M, BLOCK_D], tl.float32),
        begin,
        end,
        row_start,
        row_stop,
        kv_head,
        tables_ptr + seq.to(tl.int64) * table_stride,
        keys_ptr,
        values_ptr,
        key_scales_ptr,
        value_scales_ptr,
        scale2,
        cap2,
        unified_max2,
        least2,
        largest2,
        NUM_KV_HEADS,
        HEAD_DIM,
        BLOCK_D,
        BLOCK_SIZE,
        BLOCK_N,
        IS_INT8,
        SCHEME,
        HAS_CAP,
        IS_STRICT,
        True,
        False,
        STAGES,
    )
    is_stored = is_row & (rows == tl.where(only_row < 0, rows, only_row))
    row = (seq.to(tl.int64) * TOKEN_SLOTS + tokens) * (NUM_KV_HEADS * GROUP) + heads
    to = row * max_splits + split
    d = tl.arange(0, BLOCK_D)
    tl.store(partials_ptr + to[:, None] * HEAD_DIM + d[None, :], acc, mask=is_stored[:, None] & (d < HEAD_DIM)[None, :])
    tl.store(states_ptr + to * 2, m, mask=is_stored)
    tl.store(states_ptr + to * 2 + 1, tl.sum(sums, axis=1), mask=is_stored)


@triton.jit
def merged(
    partials_ptr,
    states_ptr,
    first_split,
    last_split,
    unified_max2,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SCHEME: tl.constexpr,
):
    """Numerators [BLOCK_D], denominator and reference of a row over its splits.

    2^(m_i - M) weighs what split i gave, M the largest of their references (Eq. 2 of arXiv:2311.01282); with a unified
    maximum all weigh 1 (Eq. 4).
    """
    d = tl.arange(0, BLOCK_D)
    m = float("-inf")
    if SCHEME == ASYNCHRONIZED:
        m = unified_max2
    else:
        for start in range(first_split, last_split + 1, _COMPARED_AT_ONCE):
            splits = start + tl.arange(0, _COMPARED_AT_ONCE)
            m_i = tl.load(states_ptr + splits * 2, mask=splits <= last_split, other=float("-inf"))
            m = tl.maximum(m, tl.max(m_i, axis=0))
    reference = reference_of(m)
    denominator = 0.0
    numerators = tl.zeros([BLOCK_D], tl.float32)
    begin = first_split // _MERGED_AT_ONCE * _MERGED_AT_ONCE
    for start in tl.range(begin, last_split + 1, _MERGED_AT_ONCE, num_stages=_MERGED_STAGES):
        splits = start + tl.arange(0, _MERGED_AT_ONCE)
        is_split = (splits >= first_split) & (splits <= last_split)
        sums = tl.load(states_ptr + splits * 2 + 1, mask=is_split, other=0.0)
        parts = tl.load(
            partials_ptr + splits[:, None] * HEAD_DIM + d[None, :],
            mask=is_split[:, None] & (d < HEAD_DIM)[None, :],
            other=0.0,
        )
        if SCHEME != ASYNCHRONIZED:
            m_i = tl.load(states_ptr + splits * 2, mask=is_split, other=float("-inf"))
            weights = tl.exp2(m_i - reference)
            sums *= weights
            parts *= weights[:, None]
        denominator += tl.sum(sums, axis=0)
        numerators += tl.sum(parts, axis=0)
    return numerators, denominator, m


@triton.jit(do_not_specialize=UNSPECIALIZED, do_not_specialize_on_alignment=UNALIGNED)
def merge_kernel(
    context_lens_ptr,
    bounds_ptr,
    owned_ptr,
    partials_ptr,
    states_ptr,
    unsound_ptr,
    out_ptr,
    normalizers_ptr,
    owned_stride,
    max_splits,
    window,
    unified_max2,
    NUM_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    MAX_TOKENS: tl.constexpr,
    TOKEN_SLOTS: tl.constexpr,
    UNIT: tl.constexpr,
    IS_INT8: tl.constexpr,
    IS_SHARE: tl.constexpr,
    SCHEME: tl.constexpr,
):
    """One row for each program: its splits merged.

    unsound_ptr, of the asynchronized scheme alone, then has 1 for rows that `repair_kernel` must compute again and 0
    for all others, those without a token among them.
    """
    row = tl.program_id(0).to(tl.int64)
    seq, i, head = _place(row, NUM_HEADS, TOKEN_SLOTS)
    first_token = tl.load(bounds_ptr + seq)
    num_tokens = tl.load(bounds_ptr + seq + 1) - first_token
    context_len = tl.load(context_lens_ptr + seq)
    if (num_tokens <= MAX_TOKENS) & (i < num_tokens):
        num_keys, first_split, last_split = _splits_of_row(
            seq, i, num_tokens, context_len, window, owned_ptr, owned_stride, BLOCK_SIZE, UNIT, IS_SHARE
        )
        numerators, denominator, m = merged(
            partials_ptr + row * max_splits * HEAD_DIM,
            states_ptr + row * max_splits * 2,
            first_split,
            last_split,
            unified_max2,
            HEAD_DIM,
            BLOCK_D,
            SCHEME,
        )
        if SCHEME == ASYNCHRONIZED:
            is_unsound = (num_keys > 0) & (is_sound(numerators, denominator, num_keys, IS_INT8) == 0)
            tl.store(unsound_ptr + row, is_unsound.to(tl.int32))
        to = (first_token + i).to(tl.int64) * NUM_HEADS + head
        _store_row(to, num_keys > 0, m, denominator, numerators, out_ptr, normalizers_ptr, HEAD_DIM, BLOCK_D, IS_SHARE)
    else:
        if SCHEME == ASYNCHRONIZED:
            tl.store(unsound_ptr + row, 0)


@triton.jit(do_not_specialize=UNSPECIALIZED, do_not_specialize_on_alignment=UNALIGNED)
def repair_kernel(
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
    unsound_ptr,
    out_ptr,
    normalizers_ptr,
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
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TOKEN_SLOTS: tl.constexpr,
    UNIT: tl.constexpr,
    IS_INT8: tl.constexpr,
    IS_SHARE: tl.constexpr,
    HAS_CAP: tl.constexpr,
    IS_STRICT: tl.constexpr,
):
    """One row for each program: if the asynchronized scheme failed it, counted and computed again, synchronized.

    It then has the bits that the synchronized scheme gives it: its splits are those of `split_kernel`.

    Not a part of `merge_kernel`, whose every program would then take the registers and the shared memory that only
    this takes.
    """
    NUM_HEADS: tl.constexpr = NUM_KV_HEADS * GROUP
    row = tl.program_id(0).to(tl.int64)
    if tl.load(unsound_ptr + row) != 0:
        tl.atomic_add(counts_ptr + 1, 1, sem="relaxed")
        seq, i, head = _place(row, NUM_HEADS, TOKEN_SLOTS)
        first_token = tl.load(bounds_ptr + seq)
        num_tokens = tl.load(bounds_ptr + seq + 1) - first_token
        context_len = tl.load(context_lens_ptr + seq)
        num_keys, first_split, last_split = _splits_of_row(
            seq, i, num_tokens, context_len, window, owned_ptr, owned_stride, BLOCK_SIZE, UNIT, IS_SHARE
        )
        tile_row = i * GROUP + head % GROUP
        for split in range(first_split, last_split + 1):
            attend_split(
                seq,
                split,
                head // GROUP,
                tile_row // BLOCK_M,
                tile_row,
                query_ptr,
                tables_ptr,
                context_lens_ptr,
                bounds_ptr,
                owned_ptr,
                keys_ptr,
                values_ptr,
                key_scales_ptr,
                value_scales_ptr,
                partials_ptr,
                states_ptr,
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
                NUM_KV_HEADS,
                GROUP,
                HEAD_DIM,
                BLOCK_D,
                BLOCK_SIZE,
                BLOCK_M,
                BLOCK_N,
                TOKEN_SLOTS,
                UNIT,
                IS_INT8,
                IS_SHARE,
                SYNCHRONIZED,
                HAS_CAP,
                IS_STRICT,
                1,
            )
        # Other threads of this program wrote what is read now.
        tl.debug_barrier()
        numerators, denominator, m = merged(
            partials_ptr + row * max_splits * HEAD_DIM,
            states_ptr + row * max_splits * 2,
            first_split,
            last_split,
            unified_max2,
            HEAD_DIM,
            BLOCK_D,
            SYNCHRONIZED,
        )
        to = (first_token + i).to(tl.int64) * NUM_HEADS + head
        _store_row(to, num_keys > 0, m, denominator, numerators, out_ptr, normalizers_ptr, HEAD_DIM, BLOCK_D, IS_SHARE)


@triton.jit
def _place(row, NUM_HEADS: tl.constexpr, TOKEN_SLOTS: tl.constexpr):
    """Sequence of a row, which of the sequence's tokens it is, and its head."""
    seq = row // (NUM_HEADS * TOKEN_SLOTS)
    i = row // NUM_HEADS % TOKEN_SLOTS
    return seq.to(tl.int32), i.to(tl.int32), (row % NUM_HEADS).to(tl.int32)


@triton.jit
def _splits_of_row(
    seq,
    i,
    num_tokens,
    context_len,
    window,
    owned_ptr,
    owned_stride,
    BLOCK_SIZE: tl.constexpr,
    UNIT: tl.constexpr,
    IS_SHARE: tl.constexpr,
):
    """How many keys a row sees, 0 or less in a place that holds no sequence, and its first and its last split."""
    start, stop = visible_positions(
        i, num_tokens, context_len, window, owned_ptr + seq.to(tl.int64) * owned_stride, BLOCK_SIZE, IS_SHARE
    )
    num_keys = tl.where(context_len > 0, stop - start, 0)
    first_split = split_of(start // UNIT)
    last_split = tl.where(num_keys > 0, split_of(tl.maximum(stop - 1, 0) // UNIT), first_split - 1)
    return num_keys, first_split, last_split


@triton.jit
def _store_row(
    to,
    has_keys,
    m,
    denominator,
    numerators,
    out_ptr,
    normalizers_ptr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    IS_SHARE: tl.constexpr,
):
    if IS_SHARE:
        tl.store(normalizers_ptr + to * 2, denominator)
        tl.store(normalizers_ptr + to * 2 + 1, tl.where(has_keys, m, float("-inf")))
    else:
        # A place in a batch that holds no sequence sees nothing; a row whose weights are all 0 gives NaN.
        numerators = numerators / tl.where(has_keys, denominator, 1.0)
    d = tl.arange(0, BLOCK_D)
    tl.store(out_ptr + to * HEAD_DIM + d, numerators, mask=d < HEAD_DIM)


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
