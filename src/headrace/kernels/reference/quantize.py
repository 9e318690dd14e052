"""Symmetric integer weights in groups along K."""

import torch
from torch import Tensor

from headrace.config import WeightFormat
from headrace.errors import KernelError
from headrace.kernels.weights import QUANTIZATION_GROUP_SIZE, QuantizedWeight


def quantize_rows(rows: Tensor, weight_format: WeightFormat) -> tuple[Tensor, Tensor]:
    """Quantize each row in groups of QUANTIZATION_GROUP_SIZE entries.

    int8: scale = max|w| / 127, rounded up. int4: scale = -w_max / 8, rounded to nearest, with w_max the entry of
    largest magnitude, so that it lands on -8 and the whole range -8 .. 7 is used; the scale may be negative.
    q = round(w / scale), clamped.

    Scales are rounded to 4 significant bits, since packed weights keep them in a byte, and q after them. Steps of int4
    are up to 6 % longer or shorter than they could be, those of int8 up to 12 % longer.

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
        scales, low, high = _in_four_bits(largest / 127.0, (1 << 20) - 1), -127, 127
    else:
        extreme = groups.gather(-1, magnitudes.argmax(dim=-1, keepdim=True))
        scales, low, high = _in_four_bits(extreme / -8.0, 1 << 19), -8, 7
    inverse = torch.where(scales == 0, 0.0, 1.0 / scales)
    # `groups` may be the caller's rows; only the product is ours to change in place.
    q = torch.mul(groups, inverse, out=magnitudes).round_().clamp_(low, high).flatten(1)[:, : rows.shape[1]]
    return (_pack_int4(q) if weight_format is WeightFormat.INT4 else q.to(torch.int8)), scales.squeeze(-1)


def round_to_float16(x: Tensor) -> Tensor:
    """Round each row to float16 after a power of two has brought its largest magnitude into [2^14, 2^15).

    An entry is off by at most 2^-12 of itself or 2^-39 of the row's largest one. A row whose largest magnitude is below
    2^-120 is all zeros; one with NaN, infinity or 2^111 and more is NaN.

    Shapes:
        x:       [n, K]
        returns: [n, K] float64
    """
    largest = x.double().abs().amax(dim=-1, keepdim=True)
    is_too_large = ~(largest < 2.0**111)
    is_zero = is_too_large | (largest < 2.0**-120)
    exponent = torch.frexp(torch.where(is_zero, 1.0, largest)).exponent - 1
    scales = torch.ldexp(torch.ones_like(largest), exponent - 14)
    rounded = torch.where(is_zero, 0.0, x.double() / scales).half().double() * scales
    return torch.where(is_too_large, torch.nan, rounded)


def quantize_activations(x: Tensor) -> tuple[Tensor, Tensor]:
    """Quantize each row to int8 in groups of QUANTIZATION_GROUP_SIZE entries with powers of two as scales.

    scale = 2^(floor(log2(max|x|)) - 6), q = round(x / scale), ties to even, clamped to -127 .. 127: the largest entry
    lands between 64 and 127. Dividing and multiplying by a power of two is exact, which saves kernels a rounding and an
    instruction for each group; against max|x| / 127 a step is up to twice as long, 1.4 times on the average.

    A group whose largest magnitude is below 2^-120 is all zeros; one with NaN, infinity or 2^111 and more has the scale
    NaN, since kernels add its integers to a float of 1.5 * 2^23 scales.

    Shapes:
        x:       [n, K]
        returns: q [n, groups, group] int8, the last group filled with zeros; scales [n, groups] float32
    Source: MXINT8, Open Compute Project, Microscaling Formats (MX) 1.0.
    """
    groups = in_groups(x.float())
    largest = groups.abs().amax(dim=-1, keepdim=True)
    is_too_large = ~(largest < 2.0**111)
    is_zero = is_too_large | (largest < 2.0**-120)
    # frexp: largest = mantissa * 2^exponent with a mantissa in [0.5, 1).
    exponent = torch.frexp(torch.where(is_zero, 1.0, largest)).exponent - 1
    scales = torch.ldexp(torch.ones_like(largest), exponent - 6)
    q = torch.where(is_zero, 0.0, groups / scales).round().clamp(-127, 127).to(torch.int8)
    return q, torch.where(is_too_large, torch.nan, scales).squeeze(-1)


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
    return rows.reshape(rows.shape[0], rows.shape[1] // QUANTIZATION_GROUP_SIZE, QUANTIZATION_GROUP_SIZE)


def _in_four_bits(scales: Tensor, added: int) -> Tensor:
    """Of each mantissa the leading one and three bits more, once `added` is added to its bits; below the normals 0."""
    shortened = ((scales.view(torch.int32) + added) & -(1 << 20)).view(torch.float32)
    return torch.where(scales.abs() < torch.finfo(torch.float32).tiny, 0.0, shortened)


def _pack_int4(q: Tensor) -> Tensor:
    if q.shape[1] % 2:
        q = torch.nn.functional.pad(q, (0, 1))
    nibbles = (q + 8).to(torch.uint8)
    return nibbles[:, 0::2] | (nibbles[:, 1::2] << 4)


def _unpack_int4(packed: Tensor) -> Tensor:
    nibbles = torch.stack((packed & 15, packed >> 4), dim=-1).flatten(1)
    return nibbles.to(torch.int8) - 8
