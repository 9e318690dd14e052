"""The k largest of long rows: a radix selection, split over programs.

Four passes count the digits of the tiles' order keys, 8 bits at a time from the top, of those keys that agree with the
k-th largest in the digits before. Then the k-th largest key is known; tiles count what lies above it and what equals
it, so that each knows where its own begin, and write k candidates. These are ranked by comparing each with all others.

Counts are added up by integer atomics: what comes out does not depend on who was first.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from headrace.kernels.triton.order import order_key, order_keys

MAX_SELECTED = 1024
"""Ranking compares each with all."""

_TILE = 4096
_NUM_WARPS = 8
_NUM_DIGITS = 4
_RADIX = 256
_RANKED = 32


@triton.jit
def load_tile(logits_ptr, row, tile, row_stride, vocab_size, TILE: tl.constexpr):
    ids = tile * TILE + tl.arange(0, TILE)
    is_inside = ids < vocab_size
    logits = tl.load(logits_ptr + row * row_stride + ids, mask=is_inside, other=0.0)
    return logits, ids, is_inside


@triton.jit
def leading_digits(counts_ptr, k, NUM_DIGITS: tl.constexpr):
    """The first digits of the k-th largest key, where they stand in it, and how many keys with these digits are among
    the k largest. The first digit's sign bit is turned, so that digits count upwards like keys."""
    prefix = 0
    remaining = k
    for digit_index in tl.static_range(NUM_DIGITS):
        digits = tl.arange(0, 256)
        counts = tl.load(counts_ptr + digit_index * 256 + digits)
        from_here_up = tl.sum(counts, axis=0) - tl.cumsum(counts, axis=0) + counts
        digit = tl.sum((from_here_up >= remaining).to(tl.int32), axis=0) - 1
        remaining -= tl.sum(tl.where(digits > digit, counts, 0), axis=0)
        sign = 128 if digit_index == 0 else 0
        prefix = prefix | ((digit ^ sign) << (24 - 8 * digit_index))
    return prefix, remaining


@triton.jit(do_not_specialize=["k"])
def count_digits_kernel(logits_ptr, counts_ptr, row_stride, vocab_size, k, DIGIT: tl.constexpr, TILE: tl.constexpr):
    """Grid: [num_rows, num_tiles]; counts: [num_rows, 4, 256], zero before the first pass."""
    row = tl.program_id(0).to(tl.int64)
    logits, _, is_counted = load_tile(logits_ptr, row, tl.program_id(1), row_stride, vocab_size, TILE)
    keys = order_key(logits)
    row_counts_ptr = counts_ptr + row * 1024
    if DIGIT == 0:
        digits = ((keys >> 24) & 255) ^ 128
    else:
        prefix, _ = leading_digits(row_counts_ptr, k, DIGIT)
        is_counted = is_counted & ((keys >> (32 - 8 * DIGIT)) == (prefix >> (32 - 8 * DIGIT)))
        digits = (keys >> (24 - 8 * DIGIT)) & 255
    counts = tl.histogram(digits, 256, mask=is_counted)
    places = row_counts_ptr + DIGIT * 256 + tl.arange(0, 256)
    tl.atomic_add(places, counts, mask=counts > 0, sem="relaxed")


@triton.jit(do_not_specialize=["k"])
def count_above_kernel(
    logits_ptr, counts_ptr, above_ptr, equal_ptr, row_stride, vocab_size, num_tiles, k, TILE: tl.constexpr
):
    """Grid: [num_rows, num_tiles]; above, equal: [num_rows, num_tiles] keys above and at the k-th largest."""
    row = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1)
    logits, _, is_inside = load_tile(logits_ptr, row, tile, row_stride, vocab_size, TILE)
    keys = order_key(logits)
    threshold, _ = leading_digits(counts_ptr + row * 1024, k, 4)
    tl.store(above_ptr + row * num_tiles + tile, tl.sum((is_inside & (keys > threshold)).to(tl.int32), axis=0))
    tl.store(equal_ptr + row * num_tiles + tile, tl.sum((is_inside & (keys == threshold)).to(tl.int32), axis=0))


@triton.jit(do_not_specialize=["k"])
def collect_kernel(
    logits_ptr,
    counts_ptr,
    above_ptr,
    equal_ptr,
    selected_ptr,
    row_stride,
    vocab_size,
    num_tiles,
    k,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid: [num_rows, num_tiles]; selected: [num_rows, k] keys with ids, first those above the k-th largest, then as
    many that equal it as there is room for, smallest ids first."""
    row = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1)
    logits, ids, is_inside = load_tile(logits_ptr, row, tile, row_stride, vocab_size, TILE)
    keys = order_key(logits)
    threshold, _ = leading_digits(counts_ptr + row * 1024, k, 4)
    tiles = tl.arange(0, BLOCK)
    above = tl.load(above_ptr + row * num_tiles + tiles, mask=tiles < num_tiles, other=0)
    equal = tl.load(equal_ptr + row * num_tiles + tiles, mask=tiles < num_tiles, other=0)
    above_before = tl.sum(tl.where(tiles < tile, above, 0), axis=0)
    equal_before = tl.sum(above, axis=0) + tl.sum(tl.where(tiles < tile, equal, 0), axis=0)
    is_above = is_inside & (keys > threshold)
    is_equal = is_inside & (keys == threshold)
    places = tl.where(
        is_above,
        above_before + tl.cumsum(is_above.to(tl.int32), axis=0) - 1,
        equal_before + tl.cumsum(is_equal.to(tl.int32), axis=0) - 1,
    )
    is_selected = (is_above | is_equal) & (places < k)
    tl.store(selected_ptr + row * k + places, order_keys(logits, ids), mask=is_selected)


@triton.jit(do_not_specialize=["k"])
def rank_kernel(selected_ptr, out_ptr, k, RANKED: tl.constexpr, BLOCK: tl.constexpr):
    """Grid: [num_rows, ceil(k / RANKED)]; out: [num_rows, k] ids, largest key first."""
    row = tl.program_id(0).to(tl.int64)
    places = tl.program_id(1) * RANKED + tl.arange(0, RANKED)
    keys = tl.load(selected_ptr + row * k + places, mask=places < k, other=0)
    ranks = tl.zeros((RANKED,), tl.int32)
    for start in range(0, k, BLOCK):
        others = start + tl.arange(0, BLOCK)
        other_keys = tl.load(selected_ptr + row * k + others, mask=others < k, other=-(2**63))
        ranks += tl.sum((other_keys[None, :] > keys[:, None]).to(tl.int32), axis=1)
    tl.store(out_ptr + row * k + ranks, 0x7FFFFFFF - (keys & 0x7FFFFFFF), mask=places < k)


def select_top_k(logits: Tensor, k: int) -> Tensor:
    """`reference.top_k` of at least one row, and 1 <= k <= min(vocab_size, MAX_SELECTED)."""
    num_rows, vocab_size = logits.shape
    num_tiles = triton.cdiv(vocab_size, _TILE)
    grid, stride, device = (num_rows, num_tiles), logits.stride(0), logits.device
    counts = torch.zeros(num_rows, _NUM_DIGITS, _RADIX, dtype=torch.int32, device=device)
    for digit in range(_NUM_DIGITS):
        count_digits_kernel[grid](logits, counts, stride, vocab_size, k, DIGIT=digit, TILE=_TILE, num_warps=_NUM_WARPS)
    above = torch.empty(num_rows, num_tiles, dtype=torch.int32, device=device)
    equal = torch.empty_like(above)
    count_above_kernel[grid](
        logits, counts, above, equal, stride, vocab_size, num_tiles, k, TILE=_TILE, num_warps=_NUM_WARPS
    )
    selected = torch.empty(num_rows, k, dtype=torch.int64, device=device)
    collect_kernel[grid](
        logits,
        counts,
        above,
        equal,
        selected,
        stride,
        vocab_size,
        num_tiles,
        k,
        TILE=_TILE,
        BLOCK=triton.next_power_of_2(num_tiles),
        num_warps=_NUM_WARPS,
    )
    out = torch.empty_like(selected)
    rank_kernel[(num_rows, triton.cdiv(k, _RANKED))](selected, out, k, RANKED=_RANKED, BLOCK=256)
    return out
