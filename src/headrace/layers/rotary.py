"""Rotary frequencies of every scaling rule, and the cosines and sines of one batch.

Source: RoFormer (arXiv:2104.09864); dynamic NTK and YaRN (arXiv:2309.00071); llama3: the Llama 3.1 reference.
"""

import math

import torch
from torch import Tensor

from headrace.config import RopeConfig, RopeScaling, RopeType
from headrace.layers.context import LayerContext


class RotaryTable:
    """cos and sin of position * inv_freq, for one `RopeConfig` and one engine.

    max_model_len: the longest sequence the engine accepts. Dynamic scaling depends on the length of a sequence; a
    shared, paged cache needs keys that depend on their position alone, so the frequencies are those of a sequence of
    max_model_len, and unscaled if that is within the original length.
    """

    def __init__(self, config: RopeConfig, max_model_len: int, context: LayerContext) -> None:
        self._kernels = context.kernels
        # Computed on the CPU, so that a model has the same frequencies wherever it runs.
        self.inv_freq = scaled_inv_freq(config, max_model_len).to(context.kernels.device)
        self.amplitude = 1.0 if config.scaling is None else amplitude(config.scaling)

    def __call__(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines, each [num_tokens, rotary_dim / 2] float32."""
        return self._kernels.rotary_table(positions, self.inv_freq, self.amplitude)


def scaled_inv_freq(config: RopeConfig, max_model_len: int) -> Tensor:
    """theta^(-2i / rotary_dim) for i = 0 .. rotary_dim / 2 - 1, stretched as the scaling rule says: float32."""
    scaling = config.scaling
    if scaling is None:
        return inv_freq(config.theta, config.rotary_dim)
    match scaling.rope_type:
        case RopeType.LINEAR:
            return inv_freq(config.theta, config.rotary_dim) / scaling.factor
        case RopeType.DYNAMIC:
            return inv_freq(_dynamic_theta(config, scaling, max_model_len), config.rotary_dim)
        case RopeType.LLAMA3:
            return _llama3(inv_freq(config.theta, config.rotary_dim), scaling)
        case RopeType.YARN:
            return _yarn(config, scaling)


def inv_freq(theta: float, rotary_dim: int) -> Tensor:
    exponents = torch.arange(0, rotary_dim, 2, dtype=torch.int64).float() / rotary_dim
    return 1.0 / (theta**exponents)


def amplitude(scaling: RopeScaling) -> float:
    """Factor on cos and sin: YaRN's attention temperature 0.1 mscale ln(factor) + 1, else 1."""
    if scaling.rope_type is not RopeType.YARN:
        return 1.0
    if scaling.attention_factor is not None:
        return scaling.attention_factor
    if scaling.mscale and scaling.mscale_all_dim:
        return _temperature(scaling.factor, scaling.mscale) / _temperature(scaling.factor, scaling.mscale_all_dim)
    return _temperature(scaling.factor, 1.0)


def _temperature(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def _dynamic_theta(config: RopeConfig, scaling: RopeScaling, max_model_len: int) -> float:
    """theta * (factor * length / original - (factor - 1))^(d / (d - 2)) beyond the original length."""
    length = max(max_model_len, scaling.original_max_position_embeddings)
    stretch = scaling.factor * length / scaling.original_max_position_embeddings - (scaling.factor - 1)
    return float(config.theta * stretch ** (config.rotary_dim / (config.rotary_dim - 2)))


def _llama3(frequencies: Tensor, scaling: RopeScaling) -> Tensor:
    """Long wavelengths are stretched by `factor`, short ones kept, those between blended linearly in their number of
    turns within the original length."""
    turns = scaling.original_max_position_embeddings * frequencies / (2 * math.pi)
    kept = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    kept = kept.clamp(0.0, 1.0)
    return (1 - kept) * frequencies / scaling.factor + kept * frequencies


def _yarn(config: RopeConfig, scaling: RopeScaling) -> Tensor:
    """Dimensions turning more than beta_fast times within the original length are kept, those turning less than
    beta_slow times stretched by `factor`, with a linear ramp between."""
    frequencies = inv_freq(config.theta, config.rotary_dim)
    low, high = (_dimension_of_turns(turns, config, scaling) for turns in (scaling.beta_fast, scaling.beta_slow))
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, config.rotary_dim - 1)
    width = high - low or 0.001  # a ramp of no width would divide by zero
    stretched = ((torch.arange(config.rotary_dim // 2).float() - low) / width).clamp(0.0, 1.0)
    return frequencies / scaling.factor * stretched + frequencies * (1 - stretched)


def _dimension_of_turns(turns: float, config: RopeConfig, scaling: RopeScaling) -> float:
    """The (fractional) dimension index whose frequency makes `turns` turns within the original length."""
    wavelength = scaling.original_max_position_embeddings / (turns * 2 * math.pi)
    return config.rotary_dim * math.log(wavelength) / (2 * math.log(config.theta))
