"""Which experts a token goes to."""

import torch
from torch import Tensor


def route_experts(router_logits: Tensor, num_experts_per_token: int, *, renormalize: bool) -> tuple[Tensor, Tensor]:
    """The most probable experts of each token and their weights: top-k of softmax(router_logits), in float32.

    Shapes:
        router_logits: [num_tokens, num_experts]
        returns:       weights [num_tokens, k] float32, expert ids [num_tokens, k] int64
    Source: Mixtral (arXiv:2401.04088) renormalizes the chosen probabilities to sum to one; some Qwen MoEs do not.
    """
    probabilities = torch.softmax(router_logits.float(), dim=-1)
    weights, experts = probabilities.topk(num_experts_per_token, dim=-1)
    if renormalize:
        weights = weights / weights.sum(dim=-1, keepdim=True)
    return weights, experts
