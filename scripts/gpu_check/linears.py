"""Linear layers, each implementation beside the library's, on every shape of the model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch.nn.functional as F
from torch import Tensor

from headrace.config import DataflowChoice, WeightFormat
from headrace.engine.tune import look_up_dataflow
from headrace.kernels import QuantizedWeight, Weight, reference
from headrace.kernels.tuning import LINEAR, LinearArm, LinearShape
from headrace.machine import cpu_limits
from scripts.gpu_check.context import TOLERANCE, Context
from scripts.gpu_check.figures import Figure

LIBRARY = "cuBLAS"
"""On the weights before they were quantized: the one peer here, which is held to their product."""

CHOSEN = "chosen"
"""By the dataflow, once it has measured this shape."""

_TUNING_ROUNDS = 3
_TOLERANCE_OF_SCALES = 1e-3
"""A layout may round the scales of quantized weights to float16."""

_MOST_ROWS = {LinearArm.GEMV: 8, LinearArm.FLAT_GEMM: 64}
"""Beyond these an implementation is far from what it was made for, and takes its time."""


def measure(weight_format: str, layer: str) -> Callable[[Context], Iterator[Figure]]:
    return partial(_measure, WeightFormat(weight_format), layer)


def _measure(weight_format: WeightFormat, layer: str, context: Context) -> Iterator[Figure]:
    n, k = context.scale.shape.linears[layer]
    matrix = context.randn(n, k)
    weights = _weights(context, weight_format, matrix)
    dense = [matrix.clone() for _ in range(context.num_copies(matrix.nbytes))]
    scaled = weight_format in (WeightFormat.INT8, WeightFormat.INT4)
    stored, multiplied = matrix.float(), _as_multiplied(weight_format, matrix)
    _tune(context, weight_format, weights)
    for num_rows in context.scale.rows:
        x = context.randn(num_rows, k)
        own: dict[str, Sequence[Callable[[], Tensor]]] = {
            name: [partial(_linear, context, arm, x, weight) for weight in weights]
            for name, arm in _arms(context, num_rows).items()
        }
        peers = {LIBRARY: [partial(F.linear, x, weight) for weight in dense]}
        errors = context.errors(own, x.float() @ multiplied.T) | context.errors(peers, x.float() @ stored.T)
        for name, found in context.race_right(own | peers, errors, peers).items():
            rounds_scales = scaled and name not in peers
            yield Figure(
                group="linear",
                labels={"format": weight_format.value, "layer": layer, "rows": num_rows, "arm": name},
                seconds=found.best_s,
                slowest_s=found.slowest_s,
                num_bytes=matrix.nbytes if name in peers else weights[0].num_bytes,
                num_ops=2 * num_rows * n * k,
                error=errors[name],
                tolerance=max(TOLERANCE[context.dtype], _TOLERANCE_OF_SCALES if rounds_scales else 0.0),
                is_captured=found.is_captured,
            )


def _tune(context: Context, weight_format: WeightFormat, weights: list[Weight]) -> None:
    """Measure where to change from one implementation to the next, as `headrace tune` does, and keep it for models that
    are loaded later in this run."""
    kernels, dataflow = context.kernels, context.kernels.dataflow
    if dataflow is None:
        return
    num_threads = context.scale.num_threads or cpu_limits().num_threads
    cache = look_up_dataflow(kernels, DataflowChoice.MEASURED, num_threads)
    n, k = weights[0].shape
    shape = LinearShape(weight_format=weight_format, out_features=n, in_features=k)
    if cache is None or shape in dataflow.tuned:
        return
    dataflow.tuned[shape] = dataflow.measure(
        kernels.linear,
        weights,
        shape,
        dtype=context.dtype,
        num_rows=context.scale.rows,
        num_rounds=1 if context.compiles_only else min(_TUNING_ROUNDS, context.scale.num_rounds),
        compares_tiles=True,
    )
    if not context.compiles_only:
        cache.keep(LINEAR, {shape: dataflow.tuned[shape]})


def _arms(context: Context, num_rows: int) -> dict[str, LinearArm | None]:
    """What the dataflow takes, and each implementation forced; None leaves it to the dataflow."""
    arms: dict[str, LinearArm | None] = {CHOSEN: None}
    if context.kernels.dataflow is not None:
        arms |= {arm.value: arm for arm in LinearArm if num_rows <= _MOST_ROWS.get(arm, num_rows)}
    return arms


def _linear(context: Context, arm: LinearArm | None, x: Tensor, weight: Weight) -> Tensor:
    dataflow = context.kernels.dataflow
    if dataflow is None:
        return context.kernels.linear(x, weight)
    dataflow.force(arm)
    try:
        return context.kernels.linear(x, weight)
    finally:
        dataflow.force(None)


def _weights(context: Context, weight_format: WeightFormat, matrix: Tensor) -> list[Weight]:
    """Copies of one weight, of which each is packed by itself."""
    n, k = matrix.shape
    kernels, weights = context.kernels, []
    for _ in range(context.num_copies(kernels.weight_num_bytes(weight_format, n, k))):
        builder = kernels.make_weight_builder(weight_format, n, k)
        builder.write(0, matrix)
        weights.append(builder.build())
    return weights


def _as_multiplied(weight_format: WeightFormat, matrix: Tensor) -> Tensor:
    """What a weight stands for once it is quantized, in float32."""
    if weight_format in (WeightFormat.FLOAT32, WeightFormat.BFLOAT16):
        return matrix.float()
    qweight, scales = reference.quantize_rows(matrix, weight_format)
    weight = QuantizedWeight(weight_format=weight_format, qweight=qweight, scales=scales, in_features=matrix.shape[1])
    return reference.dequantize(weight)
