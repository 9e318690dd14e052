"""Normalization over the last dimension, computed in float32."""

import torch
import torch.nn.functional as F
from torch import Tensor


def rms_norm(
    x: Tensor, weight: Tensor, *, eps: float, unit_offset: bool = False, residual: Tensor | None = None
) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight, or * (1 + weight) with unit_offset (arXiv:1910.07467).

    residual: x is added to it in place, and the sum normalized.

    Shapes:
        x, residual: [..., size]
        weight:      [size]
        returns:     like x, same dtype
    """
    if residual is not None:
        x = residual.add_(x)
    wide = x.float()
    scale = weight.float() + 1.0 if unit_offset else weight.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * scale).to(x.dtype)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, *, eps: float, residual: Tensor | None = None) -> Tensor:
    """(x - mean(x)) / sqrt(var(x) + eps) * weight + bias (arXiv:1607.06450).

    residual: x is added to it in place, and the sum normalized.

    Shapes:
        x, residual:  [..., size]
        weight, bias: [size]
        returns:      like x, same dtype
    """
    if residual is not None:
        x = residual.add_(x)
    return F.layer_norm(x.float(), (x.shape[-1],), weight.float(), bias.float(), eps).to(x.dtype)


def add_(residual: Tensor, x: Tensor) -> None:
    """residual += x."""
    residual.add_(x)
