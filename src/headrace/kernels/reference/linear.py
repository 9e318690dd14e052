"""Matrix products with weights as stored."""

import torch.nn.functional as F
from torch import Tensor

from headrace.errors import ShapeError
from headrace.kernels.reference.quantize import dequantize
from headrace.kernels.weights import DenseWeight, QuantizedWeight, Weight


def linear(x: Tensor, weight: Weight, bias: Tensor | None = None) -> Tensor:
    """x W^T + bias; a quantized W is expanded to x's dtype first.

    Shapes:
        x:       [num_tokens, K]
        weight:  [N, K]
        bias:    [N]
        returns: [num_tokens, N], dtype of x
    Raises:
        ShapeError: x and the weight disagree about K.
    """
    if x.shape[-1] != weight.shape[1]:
        raise ShapeError(f"input has {x.shape[-1]} columns, the weight takes {weight.shape[1]}")
    return F.linear(x, _dense(weight, x), bias)


def embedding(ids: Tensor, weight: Weight) -> Tensor:
    """Row ids[i] of the weight for each i; rows of a quantized weight come back in float32.

    Shapes:
        ids:     [num_tokens] int64
        weight:  [vocab_size, size]
        returns: [num_tokens, size]
    """
    if isinstance(weight, DenseWeight):
        return F.embedding(ids, weight.data)
    rows = QuantizedWeight(
        weight_format=weight.weight_format,
        qweight=weight.qweight[ids],
        scales=weight.scales[ids],
        in_features=weight.in_features,
    )
    return dequantize(rows)


def _dense(weight: Weight, x: Tensor) -> Tensor:
    return weight.data if isinstance(weight, DenseWeight) else dequantize(weight).to(x.dtype)
