"""Normalization layers."""

from collections.abc import Iterator
from typing import Protocol

from torch import Tensor

from headrace.config import NormConfig, NormKind
from headrace.layers.context import LayerContext
from headrace.layers.parameter import Parameter, vector_slice


class Norm(Protocol):
    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """Normalize each row of x; with a residual, add x to it in place and normalize the sum."""
        ...

    def parameters(self) -> Iterator[Parameter]: ...


class RmsNorm:
    def __init__(self, name: str, size: int, config: NormConfig, context: LayerContext) -> None:
        self._rms_norm = context.kernels.rms_norm
        self._config = config
        self.weight = Parameter([vector_slice(f"{name}.weight", size)])

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        return self._rms_norm(
            x, self.weight.vector, eps=self._config.eps, unit_offset=self._config.unit_offset, residual=residual
        )

    def parameters(self) -> Iterator[Parameter]:
        yield self.weight


class LayerNorm:
    def __init__(self, name: str, size: int, config: NormConfig, context: LayerContext) -> None:
        self._layer_norm = context.kernels.layer_norm
        self._eps = config.eps
        self.weight = Parameter([vector_slice(f"{name}.weight", size)])
        self.bias = Parameter([vector_slice(f"{name}.bias", size)])

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        return self._layer_norm(x, self.weight.vector, self.bias.vector, eps=self._eps, residual=residual)

    def parameters(self) -> Iterator[Parameter]:
        yield self.weight
        yield self.bias


def make_norm(name: str, size: int, config: NormConfig, context: LayerContext) -> Norm:
    match config.kind:
        case NormKind.RMS:
            return RmsNorm(name, size, config, context)
        case NormKind.LAYER:
            return LayerNorm(name, size, config, context)
