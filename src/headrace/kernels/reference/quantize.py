"""Symmetric integer weights in groups along K."""

import torch
from torch import Tensor

from headrace.config import WeightFormat
from headrace.errors import KernelError
from headrace.kernels.weights import QUANTIZATION_GROUP_SIZE, QuantizedWeight


def quantize_rows(rows: Tensor, weight_format: WeightFormat) -> tuple[Tensor, Tensor]:
    """Quantize each row in groups of QUANTIZATION_GROUP_SIZE entries.

    int8: scale = max|w| / 127. int4: scale = -w_max / 8 with w_max the entry of largest magnitude, so that it lands on
    -8 and the whole range -8 .. 7 is used; the scale may be negative. q = round(w / scale), clamped.

    Shapes:
        rows:    [n, K]
        returns: qweight and scales of `QuantizedWeight`
    Raises:
        KernelError: a value that is not finite.
    """
    groups = in_groups(rows.float())
    magnitudes = groups.abs()
    largest = magnitudes.amax(dim=-1, keepdim=True)
    if not torch.isfinite(largest).all():
        raise KernelError("cannot quantize a weight that holds NaN or infinity")
    if weight_format is WeightFormat.INT8:
        scales, low, high = largest / 127.0, -127, 127
    else:
        extreme = groups.gather(-1, magnitudes.argmax(dim=-1, keepdim=True))
        scales, low, high = extreme / -8.0, -8, 7
    scales = torch.where(scales.abs() < torch.finfo(torch.float32).tiny, 0.0, scales)
    inverse = torch.where(scales == 0, 0.0, 1.0 / scales)
    # `groups` may be the caller's rows; only the product is ours to change in place.
    q = torch.mul(groups, inverse, out=magnitudes).round_().clamp_(low, high).flatten(1)[:, : rows.shape[1]]
    return (_pack_int4(q) if weight_format is WeightFormat.INT4 else q.to(torch.int8)), scales.squeeze(-1)


def dequantize(weight: QuantizedWeight) -> Tensor:
    """The float32 matrix a quantized weight stands for: [N, K]."""
    scaled = in_groups(unpacked_values(weight).float()) * weight.scales.unsqueeze(-1)
    return scaled.flatten(1)[:, : weight.in_features]


def unpacked_values(weight: QuantizedWeight) -> Tensor:
    """The integers of a quantized weight: [N, K] int8."""
    q = _unpack_int4(weight.qweight) if weight.weight_format is WeightFormat.INT4 else weight.qweight
    return q[:, : weight.in_features]


def in_groups(rows: Tensor) -> Tensor:
    """[n, K] as [n, ceil(K / group), group], the last group filled with zeros."""
    padding = -rows.shape[1] % QUANTIZATION_GROUP_SIZE
    if padding:
        rows = torch.nn.functional.pad(rows, (0, padding))
    return rows.reshape(rows.shape[0], -1, QUANTIZATION_GROUP_SIZE)


def _pack_int4(q: Tensor) -> Tensor:
    if q.shape[1] % 2:
        q = torch.nn.functional.pad(q, (0, 1))
    nibbles = (q + 8).to(torch.uint8)
    return nibbles[:, 0::2] | (nibbles[:, 1::2] << 4)


def _unpack_int4(packed: Tensor) -> Tensor:
    nibbles = torch.stack((packed & 15, packed >> 4), dim=-1).flatten(1)
    return nibbles.to(torch.int8) - 8
