"""Which experts each token goes to, and which tokens each expert takes; both stay on the device."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from headrace.kernels.triton.order import order_keys

_BLOCK_PAIRS = 1024


class Routing(NamedTuple):
    """A pair is a token and one of its experts: pair i is of token i // k. A token's experts ascend.

    Shapes:
        weights: [num_tokens, k] float32, of each expert's output
        pairs:   [num_tokens * k] int32, sorted by expert and within one by token
        starts:  [num_experts + 1] int32, where each expert's pairs begin, and the number of all
    """

    weights: Tensor
    pairs: Tensor
    starts: Tensor


@triton.jit
def route_kernel(
    logits_ptr,
    weights_ptr,
    experts_ptr,
    row_stride,
    num_experts,
    K: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid: [num_tokens]; weights, experts: [num_tokens, K]. Of equal logits the first expert is taken."""
    row = tl.program_id(0).to(tl.int64)
    ids = tl.arange(0, BLOCK)
    is_inside = ids < num_experts
    logits = tl.load(logits_ptr + row * row_stride + ids, mask=is_inside, other=float("-inf")).to(tl.float32)
    exponentials = tl.where(is_inside, tl.exp(logits - tl.max(logits, axis=0)), 0.0)
    probabilities = exponentials / tl.sum(exponentials, axis=0)
    # A NaN is the largest, so that experts are chosen from whatever the router said. Its weights are NaN.
    keys = tl.where(is_inside, order_keys(logits, ids), -(2**63))
    is_taken = ids < 0
    for _ in tl.static_range(K):
        best = 0x7FFFFFFF - (tl.max(keys, axis=0) & 0x7FFFFFFF)
        is_taken = is_taken | (ids == best)
        keys = tl.where(ids == best, -(2**63), keys)
    if RENORMALIZE:
        probabilities /= tl.sum(tl.where(is_taken, probabilities, 0.0), axis=0)
    places = row * K + tl.cumsum(is_taken.to(tl.int32), axis=0) - 1
    tl.store(weights_ptr + places, probabilities, mask=is_taken)
    tl.store(experts_ptr + places, ids, mask=is_taken)


@triton.jit(do_not_specialize=["num_pairs"])
def group_kernel(experts_ptr, pairs_ptr, starts_ptr, num_pairs, BLOCK: tl.constexpr):
    """Grid: [num_experts]; each program reads every pair's expert twice: to count, and to place its own."""
    expert = tl.program_id(0)
    start = 0
    for offset in range(0, num_pairs, BLOCK):
        places = offset + tl.arange(0, BLOCK)
        experts = tl.load(experts_ptr + places, mask=places < num_pairs, other=2**30)
        start += tl.sum((experts < expert).to(tl.int32), axis=0)
    tl.store(starts_ptr + expert, start)
    if expert == tl.num_programs(0) - 1:
        tl.store(starts_ptr + expert + 1, num_pairs)
    for offset in range(0, num_pairs, BLOCK):
        places = offset + tl.arange(0, BLOCK)
        is_own = tl.load(experts_ptr + places, mask=places < num_pairs, other=2**30) == expert
        own = is_own.to(tl.int32)
        tl.store(pairs_ptr + start + tl.cumsum(own, axis=0) - 1, places, mask=is_own)
        start += tl.sum(own, axis=0)


def route(router_logits: Tensor, num_experts_per_token: int, *, renormalize: bool) -> Routing:
    """`reference.route_experts`, and tokens grouped by expert, of at least one token."""
    num_tokens, num_experts = router_logits.shape
    device, shape = router_logits.device, (num_tokens, num_experts_per_token)
    weights = torch.empty(shape, dtype=torch.float32, device=device)
    experts = torch.empty(shape, dtype=torch.int32, device=device)
    route_kernel[(num_tokens,)](
        router_logits,
        weights,
        experts,
        router_logits.stride(0),
        num_experts,
        K=num_experts_per_token,
        RENORMALIZE=renormalize,
        BLOCK=triton.next_power_of_2(num_experts),
        num_warps=1,
    )
    pairs = torch.empty(experts.numel(), dtype=torch.int32, device=device)
    starts = torch.empty(num_experts + 1, dtype=torch.int32, device=device)
    group_kernel[(num_experts,)](experts, pairs, starts, experts.numel(), BLOCK=_BLOCK_PAIRS, num_warps=4)
    return Routing(weights, pairs, starts)
