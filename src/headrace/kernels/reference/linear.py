"""Matrix products with weights as stored."""

import torch
import torch.nn.functional as F
from torch import Tensor

from headrace.errors import KernelError, ShapeError
from headrace.kernels.reference.quantize import (
    dequantize,
    in_groups,
    quantize_activations,
    round_to_float16,
    unpacked_values,
)
from headrace.kernels.weights import BlockedWeight, DenseWeight, PackedWeight, QuantizedWeight, Weight

_EXPANDED_ELEMENTS = 2**19
"""Of a quantized weight expanded at once: a whole one would need many times the memory that quantizing saved."""


def linear(x: Tensor, weight: Weight, bias: Tensor | None = None, *, out_dtype: torch.dtype | None = None) -> Tensor:
    """x W^T + bias; a quantized W is expanded to x's dtype, some rows at a time.

    out_dtype: that of x if None.

    Shapes:
        x:       [num_tokens, K]
        weight:  [N, K]
        bias:    [N]
        returns: [num_tokens, N]
    Raises:
        ShapeError: x and the weight disagree about K.
    """
    if x.shape[-1] != weight.shape[1]:
        raise ShapeError(f"input has {x.shape[-1]} columns, the weight takes {weight.shape[1]}")
    if isinstance(weight, DenseWeight):
        return F.linear(x, weight.data, bias).to(out_dtype or x.dtype)
    weight = _quantized(weight)
    out = x.new_empty(x.shape[0], weight.shape[0])
    step = max(1, _EXPANDED_ELEMENTS // weight.shape[1])
    for start in range(0, weight.shape[0], step):
        rows = _rows(weight, slice(start, start + step))
        out[:, start : start + step] = F.linear(x, dequantize(rows).to(x.dtype))
    return (out if bias is None else out + bias).to(out_dtype or x.dtype)


def linear_int8_activations(x: Tensor, weight: QuantizedWeight, bias: Tensor | None = None) -> Tensor:
    """x W^T + bias with x quantized to int8 by row and group along K (`quantize_activations`).

    out = sum over groups g of scale_x[g] * scale_w[g] * (q_x[g] . q_w[g]): the dot products are exact integers, the sum
    is float32 in ascending order of g, rounded once to the dtype of x. NaN, infinity or a magnitude of 2^111 makes its
    row NaN.

    Shapes: as `linear`.
    """
    q_x, scale_x = quantize_activations(x)
    # float64 holds the integers and their products exactly.
    x_groups = q_x.double().transpose(0, 1)
    w_groups = in_groups(unpacked_values(weight).double()).transpose(0, 1)
    out = torch.zeros(x.shape[0], weight.shape[0], device=x.device)
    for g, (x_group, w_group) in enumerate(zip(x_groups, w_groups, strict=True)):
        scales = scale_x[:, g, None] * weight.scales[None, :, g]
        out += (x_group @ w_group.T).float() * scales
    if bias is not None:
        out += bias.float()
    return out.to(x.dtype)


def linear_float16_activations(x: Tensor, weight: QuantizedWeight, bias: Tensor | None = None) -> Tensor:
    """x W^T + bias with each row of x, times a power of two, rounded to float16 (`round_to_float16`), in float64.

    What native kernels with float16 tiles compute, but for their rounding of scale * q of int8 to float16 and their
    float32 sums. NaN, infinity or a magnitude of 2^111 makes its row NaN.

    Shapes: as `linear`.
    """
    out = round_to_float16(x) @ dequantize(weight).double().T
    return (out if bias is None else out + bias.double()).to(x.dtype)


def embedding(
    ids: Tensor,
    weight: Weight,
    *,
    dtype: torch.dtype,
    scale: float = 1.0,
    offset: int = 0,
    zeros_outside: bool = False,
) -> Tensor:
    """scale * row (ids[i] + offset) of the weight for each i, rounded to dtype before the product and after it.

    zeros_outside: an id whose row is not in the weight, because another rank holds it, gives zeros.

    Shapes:
        ids:     [num_tokens] int64
        weight:  [vocab_size, size]
        returns: [num_tokens, size] of dtype
    """
    ids = ids + offset
    if zeros_outside:
        is_inside = (ids >= 0) & (ids < weight.shape[0])
        out = torch.zeros(*ids.shape, weight.shape[1], dtype=dtype, device=ids.device)
        out[is_inside] = embedding(ids[is_inside], weight, dtype=dtype, scale=scale)
        return out
    if isinstance(weight, DenseWeight):
        rows = F.embedding(ids, weight.data)
    else:
        rows = dequantize(_rows(_quantized(weight), ids))
    return rows.to(dtype) * scale


def weight_rows(weight: Weight, rows: range) -> Weight:
    """Rows of a weight as one of their own, in the same memory.

    Shapes:
        weight:  [N, K]; rows begin at a multiple of 16 and end at one or at N
        returns: [len(rows), K]
    """
    part = slice(rows.start, rows.stop)
    return DenseWeight(data=weight.data[part]) if isinstance(weight, DenseWeight) else _rows(_quantized(weight), part)


def _rows(weight: QuantizedWeight, rows: Tensor | slice) -> QuantizedWeight:
    return QuantizedWeight(
        weight_format=weight.weight_format,
        qweight=weight.qweight[rows],
        scales=weight.scales[rows],
        in_features=weight.in_features,
    )


def _quantized(weight: QuantizedWeight | PackedWeight | BlockedWeight) -> QuantizedWeight:
    if not isinstance(weight, QuantizedWeight):
        raise KernelError(f"the reference kernels cannot read a {type(weight).__name__}")
    return weight
