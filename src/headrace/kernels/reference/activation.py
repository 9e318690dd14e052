"""Feed-forward activations."""

import torch.nn.functional as F
from torch import Tensor

from headrace.config import Activation


def activation(x: Tensor, kind: Activation) -> Tensor:
    """act(x), elementwise; GELU exact (erf) or in its tanh approximation (arXiv:1606.08415)."""
    match kind:
        case Activation.SILU:
            return F.silu(x)
        case Activation.GELU:
            return F.gelu(x)
        case Activation.GELU_TANH:
            return F.gelu(x, approximate="tanh")
        case Activation.RELU:
            return F.relu(x)


def gated_activation(x: Tensor, kind: Activation) -> Tensor:
    """act(gate) * up, gate and up side by side in x (GLU variants, arXiv:2002.05202).

    Shapes:
        x:       [num_tokens, 2 * intermediate_size]
        returns: [num_tokens, intermediate_size]
    """
    gate, up = x.chunk(2, dim=-1)
    return activation(gate, kind) * up
