"""Matrix products with weights as stored."""

import torch.nn.functional as F
from torch import Tensor

from headrace.errors import ShapeError
from headrace.kernels.reference.quantize import dequantize
from headrace.kernels.weights import DenseWeight, QuantizedWeight, Weight

_EXPANDED_ELEMENTS = 2**19
"""Of a quantized weight expanded at once: a whole one would need many times the memory that quantizing saved."""


def linear(x: Tensor, weight: Weight, bias: Tensor | None = None) -> Tensor:
    """x W^T + bias; a quantized W is expanded to x's dtype, some rows at a time.

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
    if isinstance(weight, DenseWeight):
        return F.linear(x, weight.data, bias)
    out = x.new_empty(x.shape[0], weight.shape[0])
    step = max(1, _EXPANDED_ELEMENTS // weight.shape[1])
    for start in range(0, weight.shape[0], step):
        rows = _rows(weight, slice(start, start + step))
        out[:, start : start + step] = F.linear(x, dequantize(rows).to(x.dtype))
    return out if bias is None else out + bias


def embedding(ids: Tensor, weight: Weight) -> Tensor:
    """Row ids[i] of the weight for each i; rows of a quantized weight come back in float32.

    Shapes:
        ids:     [num_tokens] int64
        weight:  [vocab_size, size]
        returns: [num_tokens, size]
    """
    if isinstance(weight, DenseWeight):
        return F.embedding(ids, weight.data)
    return dequantize(_rows(weight, ids))


def _rows(weight: QuantizedWeight, rows: Tensor | slice) -> QuantizedWeight:
    return QuantizedWeight(
        weight_format=weight.weight_format,
        qweight=weight.qweight[rows],
        scales=weight.scales[rows],
        in_features=weight.in_features,
    )
