"""Mixtures of experts: which of them a token goes to, and what comes of it."""

import torch
from torch import Tensor

from headrace.kernels.ops import LinearOp, MixtureSpec
from headrace.kernels.reference.activation import gated_activation
from headrace.kernels.reference.linear import linear
from headrace.kernels.weights import Experts


def mixture(
    x: Tensor, router_logits: Tensor, experts: Experts, spec: MixtureSpec, *, linear: LinearOp = linear
) -> Tensor:
    """Each token through its `num_experts_per_token` best experts, their outputs summed by probability.

    out = sum of p[e] * down_e(act(gate_e(x)) * up_e(x)) over the experts taken, e ascending; in float32, rounded once.

    linear: multiplies x by an expert's weights.

    Shapes:
        x:             [num_tokens, hidden_size]
        router_logits: [num_tokens, num_experts], dtype of x
        returns:       like x
    """
    weights, chosen = route_experts(router_logits, spec.num_experts_per_token, renormalize=spec.renormalize)
    out = torch.zeros_like(x, dtype=torch.float32)
    for expert in sorted(set(chosen.flatten().tolist())):
        tokens, choice = (chosen == expert).nonzero(as_tuple=True)
        activated = gated_activation(linear(x[tokens], experts.up[expert]), spec.activation)
        down = linear(activated, experts.down[expert], out_dtype=torch.float32)
        out.index_add_(0, tokens, down * weights[tokens, choice, None])
    return out.to(x.dtype)


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
