"""Linear layers alone, in every format, beside their limits."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from headrace.bench.kernel_rounds import KernelFigure, num_copies, time_rounds
from headrace.bench.kernels import ModelShape
from headrace.config import WeightFormat
from headrace.kernels import Kernels, Weight


@dataclass(frozen=True, kw_only=True)
class LinearFigure(KernelFigure):
    """One linear layer for num_rows rows. num_bytes: the weight's, packed, scales included."""

    weight_format: WeightFormat
    layer: str
    out_features: int
    in_features: int
    num_rows: int


def measure_linears(
    kernels: Kernels,
    shape: ModelShape,
    formats: Sequence[WeightFormat],
    rows: Sequence[int],
    on_start: Callable[[str], None],
) -> Iterator[LinearFigure]:
    """Every layer of the shape in every format, for every number of rows."""
    for weight_format in formats:
        dtype = torch.float32 if weight_format is WeightFormat.FLOAT32 else torch.bfloat16
        for layer, (n, k) in shape.linears.items():
            on_start(f"{weight_format.value} {layer} [{n}, {k}]")
            weights = _weights(kernels, weight_format, n, k)
            runs = [_linear(kernels, weights, torch.randn(m, k, device=kernels.device).to(dtype)) for m in rows]
            times = time_rounds(kernels, runs, len(weights), weight_format)
            for m, seconds in zip(rows, times.seconds, strict=True):
                yield LinearFigure(
                    weight_format=weight_format,
                    layer=layer,
                    out_features=n,
                    in_features=k,
                    num_rows=m,
                    num_bytes=weights[0].num_bytes,
                    num_ops=2 * m * n * k,
                    seconds=seconds,
                    read_bytes_per_s=times.read_bytes_per_s,
                    ops_per_s=times.ops_per_s,
                )


def _linear(kernels: Kernels, weights: Sequence[Weight], x: Tensor) -> Callable[[int], object]:
    return lambda i: kernels.linear(x, weights[i])


def _weights(kernels: Kernels, weight_format: WeightFormat, n: int, k: int) -> list[Weight]:
    matrix = torch.randn(n, k, device=kernels.device)
    weights = []
    for _ in range(num_copies(kernels.weight_num_bytes(weight_format, n, k))):
        builder = kernels.make_weight_builder(weight_format, n, k)
        builder.write(0, matrix)
        weights.append(builder.build())
    return weights
