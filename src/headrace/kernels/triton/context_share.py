"""What ranks that share a context do with their shares of attention."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from headrace.errors import KernelError, ShapeError
from headrace.kernels.ops import AttentionShare
from headrace.kernels.triton.softmax import reference_of

_HEADS = 8


def weigh_share(
    share: AttentionShare, normalizers: Sequence[Tensor], rank: int, *, dtype: torch.dtype, num_parts: int = 1
) -> Tensor:
    """`reference.weigh_share`, but 0 for a place in a batch that holds no sequence, of which no rank sees anything.

    Raises:
        ShapeError: normalizers that are not those of the share's tokens and heads, or heads that do not divide.
        KernelError: tensors that are not float32.
    """
    num_tokens, num_heads, head_dim = share.numerators.shape
    expected = num_tokens, num_heads, 2
    if any(tuple(x.shape) != expected for x in normalizers) or num_heads % num_parts:
        raise ShapeError(
            f"normalizers of {[list(x.shape) for x in normalizers]} for {num_parts} parts; allowed: "
            f"{list(expected)}, heads divided by the parts"
        )
    if {x.dtype for x in (*normalizers, share.numerators)} != {torch.float32}:
        raise KernelError("numerators and normalizers must be float32")
    numerators = share.numerators.contiguous()
    out = torch.empty(num_parts, num_tokens, num_heads // num_parts, head_dim, dtype=dtype, device=numerators.device)
    if num_tokens:
        weigh_share_kernel[(num_tokens, triton.cdiv(num_heads, _HEADS))](
            numerators,
            torch.stack(list(normalizers)),
            out,
            rank,
            num_tokens,
            NUM_RANKS=len(normalizers),
            RANKS=triton.next_power_of_2(len(normalizers)),
            NUM_HEADS=num_heads,
            PART_HEADS=num_heads // num_parts,
            HEADS=_HEADS,
            HEAD_DIM=head_dim,
            BLOCK_D=triton.next_power_of_2(head_dim),
            num_warps=4,
        )
    return out


@triton.jit(do_not_specialize=("rank", "num_tokens"))
def weigh_share_kernel(
    numerators_ptr,
    normalizers_ptr,
    out_ptr,
    rank,
    num_tokens,
    NUM_RANKS: tl.constexpr,
    RANKS: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    PART_HEADS: tl.constexpr,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One token and some heads: normalizers [ranks, tokens, heads, 2]."""
    token = tl.program_id(0).to(tl.int64)
    heads = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    is_head = heads < NUM_HEADS
    ranks = tl.arange(0, RANKS)[:, None]
    is_state = (ranks < NUM_RANKS) & is_head[None, :]
    states = normalizers_ptr + ((ranks * num_tokens + token) * NUM_HEADS + heads[None, :]) * 2
    denominators = tl.load(states, mask=is_state, other=0.0)
    references = tl.load(states + 1, mask=is_state, other=float("-inf"))
    largest = tl.max(references, axis=0)
    weights = tl.exp2(references - reference_of(largest)[None, :])
    total = tl.sum(weights * denominators, axis=0)
    mine = tl.sum(tl.where(ranks == rank, weights, 0.0), axis=0)
    factor = mine / tl.where(largest == float("-inf"), 1.0, total)
    d = tl.arange(0, BLOCK_D)[None, :]
    is_entry = is_head[:, None] & (d < HEAD_DIM)
    x = tl.load(numerators_ptr + (token * NUM_HEADS + heads[:, None]) * HEAD_DIM + d, mask=is_entry, other=0.0)
    row = (heads // PART_HEADS * num_tokens + token) * PART_HEADS + heads % PART_HEADS
    tl.store(out_ptr + row[:, None] * HEAD_DIM + d, x * factor[:, None], mask=is_entry)
