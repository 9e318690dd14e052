"""The splits of decoded rows, merged in order, and the rows of the asynchronized scheme that must be computed again.

The second and the third launch of `attention_decode`.
"""

import triton
import triton.language as tl

from headrace.kernels.triton.attention_arguments import Batch, KeysAndValues, LogitNumbers, Partials
from headrace.kernels.triton.attention_decode import attend_split
from headrace.kernels.triton.attention_rows import UNALIGNED, UNSPECIALIZED, visible_positions
from headrace.kernels.triton.softmax import ASYNCHRONIZED, is_sound, reference_of
from headrace.kernels.triton.splits import split_of

_MERGED_AT_ONCE: tl.constexpr = tl.constexpr(8)
"""Splits that are summed as one: always so many, since how a sum is formed shows in its last bit.

Fewer than a tile has rows or positions: what is read in one kernel in tiles of one shape gets one layout from the
compiler, and so another order of the sum in `repair_kernel`, which reads queries too, than in `merge_kernel`.
"""

_MERGED_STAGES: tl.constexpr = tl.constexpr(5)
"""Of the loop over them: the 32 splits of 4,096 tokens are under way together, in 17 KiB of shared memory."""

_COMPARED_AT_ONCE: tl.constexpr = tl.constexpr(128)
"""Splits whose references are read at once, which is all of a context of up to 256k tokens."""


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
    HEADS: tl.constexpr,
    SHAPE: tl.constexpr,
    TOKEN_SLOTS: tl.constexpr,
    UNIT: tl.constexpr,
    SCHEME: tl.constexpr,
):
    """One row for each program: its splits merged.

    unsound_ptr, of the asynchronized scheme alone, then has 1 for rows that `repair_kernel` must compute again and 0
    for all others, those without a token among them.
    """
    partials = Partials(partials_ptr, states_ptr, max_splits)
    row = tl.program_id(0).to(tl.int64)
    seq, i, head = _place(row, HEADS, TOKEN_SLOTS)
    first_token = tl.load(bounds_ptr + seq)
    num_tokens = tl.load(bounds_ptr + seq + 1) - first_token
    context_len = tl.load(context_lens_ptr + seq)
    if (num_tokens <= SHAPE.max_tokens) & (i < num_tokens):
        owned = owned_ptr + seq.to(tl.int64) * owned_stride
        num_keys, first_split, last_split = _splits_of_row(i, num_tokens, context_len, window, owned, HEADS, UNIT)
        numerators, denominator, m = _merged(row, first_split, last_split, partials, unified_max2, HEADS, SCHEME)
        if SCHEME == ASYNCHRONIZED:
            is_unsound = (num_keys > 0) & (is_sound(numerators, denominator, num_keys, HEADS.is_int8) == 0)
            tl.store(unsound_ptr + row, is_unsound.to(tl.int32))
        to = (first_token + i).to(tl.int64) * HEADS.num_heads + head
        _store_row(to, num_keys > 0, m, denominator, numerators, out_ptr, normalizers_ptr, HEADS)
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
    HEADS: tl.constexpr,
    SOFTMAX: tl.constexpr,
    SHAPE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TOKEN_SLOTS: tl.constexpr,
    UNIT: tl.constexpr,
):
    """One row for each program: if the asynchronized scheme failed it, counted and computed again by another, SOFTMAX.

    It then has the bits that the other scheme gives it: its splits are those of `split_kernel`.

    Not a part of `merge_kernel`, whose every program would then take the registers and the shared memory that only
    this takes.
    """
    batch = Batch(tables_ptr, table_stride, context_lens_ptr, bounds_ptr, owned_ptr, owned_stride, window)
    cache = KeysAndValues(keys_ptr, values_ptr, key_scales_ptr, value_scales_ptr)
    logits = LogitNumbers(scale2, cap2, unified_max2, least2, largest2)
    partials = Partials(partials_ptr, states_ptr, max_splits)
    row = tl.program_id(0).to(tl.int64)
    if tl.load(unsound_ptr + row) != 0:
        tl.atomic_add(counts_ptr + 1, 1, sem="relaxed")
        seq, i, head = _place(row, HEADS, TOKEN_SLOTS)
        first_token = tl.load(bounds_ptr + seq)
        num_tokens = tl.load(bounds_ptr + seq + 1) - first_token
        context_len = tl.load(context_lens_ptr + seq)
        owned = owned_ptr + seq.to(tl.int64) * owned_stride
        num_keys, first_split, last_split = _splits_of_row(i, num_tokens, context_len, window, owned, HEADS, UNIT)
        tile_row = i * HEADS.group + head % HEADS.group
        for split in range(first_split, last_split + 1):
            attend_split(
                seq,
                split,
                head // HEADS.group,
                tile_row // SHAPE.block_m,
                tile_row,
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
                STAGES=1,
            )
        # Other threads of this program wrote what is read now.
        tl.debug_barrier()
        numerators, denominator, m = _merged(
            row, first_split, last_split, partials, unified_max2, HEADS, SOFTMAX.scheme
        )
        to = (first_token + i).to(tl.int64) * HEADS.num_heads + head
        _store_row(to, num_keys > 0, m, denominator, numerators, out_ptr, normalizers_ptr, HEADS)


@triton.jit
def _place(row, HEADS: tl.constexpr, TOKEN_SLOTS: tl.constexpr):
    """Sequence of a row, which of the sequence's tokens it is, and its head."""
    seq = row // (HEADS.num_heads * TOKEN_SLOTS)
    i = row // HEADS.num_heads % TOKEN_SLOTS
    return seq.to(tl.int32), i.to(tl.int32), (row % HEADS.num_heads).to(tl.int32)


@triton.jit
def _splits_of_row(i, num_tokens, context_len, window, owned_ptr, HEADS: tl.constexpr, UNIT: tl.constexpr):
    """How many keys a row sees, 0 or less in a place that holds no sequence, and its first and its last split."""
    start, stop = visible_positions(i, num_tokens, context_len, window, owned_ptr, HEADS)
    num_keys = tl.where(context_len > 0, stop - start, 0)
    first_split = split_of(start // UNIT)
    last_split = tl.where(num_keys > 0, split_of(tl.maximum(stop - 1, 0) // UNIT), first_split - 1)
    return num_keys, first_split, last_split


@triton.jit
def _merged(row, first_split, last_split, partials, unified_max2, HEADS: tl.constexpr, SCHEME: tl.constexpr):
    """Numerators [block_d], denominator and reference of a row over its splits.

    2^(m_i - M) weighs what split i gave, M the largest of their references (Eq. 2 of arXiv:2311.01282); with a unified
    maximum all weigh 1 (Eq. 4).
    """
    BLOCK_D: tl.constexpr = HEADS.block_d
    numerators_ptr = partials.numerators_ptr + row * partials.max_splits * HEADS.head_dim
    states_ptr = partials.states_ptr + row * partials.max_splits * 2
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
            numerators_ptr + splits[:, None] * HEADS.head_dim + d[None, :],
            mask=is_split[:, None] & (d < HEADS.head_dim)[None, :],
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


@triton.jit
def _store_row(to, has_keys, m, denominator, numerators, out_ptr, normalizers_ptr, HEADS: tl.constexpr):
    if HEADS.is_share:
        tl.store(normalizers_ptr + to * 2, denominator)
        tl.store(normalizers_ptr + to * 2 + 1, tl.where(has_keys, m, float("-inf")))
    else:
        # A place in a batch that holds no sequence sees nothing; a row whose weights are all 0 gives NaN.
        numerators = numerators / tl.where(has_keys, denominator, 1.0)
    d = tl.arange(0, HEADS.block_d)
    tl.store(out_ptr + to * HEADS.head_dim + d, numerators, mask=d < HEADS.head_dim)
