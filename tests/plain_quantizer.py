"""The quantized formats entry by entry in numpy: the oracle of the kernels and of whole quantized models."""

from collections.abc import Callable

import numpy as np

from headrace.config import WeightFormat
from headrace.kernels import QUANTIZATION_GROUP_SIZE, QuantizedWeight


def plain_quantize(rows: np.ndarray, weight_format: WeightFormat) -> tuple[np.ndarray, np.ndarray]:
    """Integers [n, K] and scales [n, groups], entry by entry from the definition, in float32 like the op."""
    n, columns = rows.shape
    starts = range(0, columns, QUANTIZATION_GROUP_SIZE)
    q, scales = np.zeros((n, columns), np.int64), np.zeros((n, len(starts)), np.float32)
    for row in range(n):
        for g, start in enumerate(starts):
            group = rows[row, start : start + QUANTIZATION_GROUP_SIZE].astype(np.float32)
            extreme = group[np.abs(group).argmax()]
            is_int8 = weight_format is WeightFormat.INT8
            scale = (
                four_bits(abs(extreme) / np.float32(127), np.ceil)
                if is_int8
                else four_bits(extreme / np.float32(-8), half_up)
            )
            low, high = (-127, 127) if is_int8 else (-8, 7)
            scales[row, g] = scale
            if scale != 0:
                q[row, start : start + len(group)] = np.clip(np.rint(group * (np.float32(1) / scale)), low, high)
    return q, scales


def four_bits(value: np.float32, rounded: Callable[[np.float64], np.float64]) -> np.float32:
    """A leading one and three bits; 0 for what is below the normal numbers."""
    if abs(value) < np.finfo(np.float32).tiny:
        return np.float32(0)
    mantissa, exponent = np.frexp(np.float64(value))
    return np.float32(np.sign(mantissa) * np.ldexp(rounded(abs(mantissa) * 16), int(exponent) - 4))


def half_up(value: np.float64) -> np.float64:
    return np.floor(value + 0.5)


def plain_dequantize(q: np.ndarray, scales: np.ndarray) -> np.ndarray:
    return q * np.repeat(scales.astype(np.float64), QUANTIZATION_GROUP_SIZE, axis=1)[:, : q.shape[1]]


def unpack(weight: QuantizedWeight) -> np.ndarray:
    """The integers of a weight, read by the layout its docstring states."""
    stored = weight.qweight.numpy()
    if weight.weight_format is WeightFormat.INT8:
        return stored.astype(np.int64)
    entry = np.arange(weight.in_features)
    return ((stored[:, entry // 2] >> (4 * (entry % 2))) & 15).astype(np.int64) - 8


def pack(q: np.ndarray, weight_format: WeightFormat) -> np.ndarray:
    """Integers as a checkpoint stores them: the inverse of `unpack`."""
    if weight_format is WeightFormat.INT8:
        return q.astype(np.int8)
    stored = np.zeros((q.shape[0], -(-q.shape[1] // 2)), np.uint8)
    for entry in range(q.shape[1]):
        stored[:, entry // 2] |= ((q[:, entry] + 8) << (4 * (entry % 2))).astype(np.uint8)
    if q.shape[1] % 2:
        stored[:, -1] |= 8 << 4  # the entry past the end is a zero
    return stored
