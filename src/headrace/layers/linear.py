"""Linear layers cut along their output (columns of W^T) or input (rows of W^T) dimension."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from headrace.layers.context import LayerContext
from headrace.layers.parameter import Parameter, TensorSlice, vector_slice


@dataclass(frozen=True, kw_only=True)
class OutputPart:
    """One projection of a fused column-parallel layer; `rows` are the output rows this rank keeps of `size`."""

    name: str
    size: int
    rows: range


class ColumnParallelLinear:
    """y_local = x W_local^T + b_local: each rank computes some outputs of each part; no communication.

    Shapes:
        x:       [num_tokens, in_features], the same on every rank
        returns: [num_tokens, sum of the parts' local rows]
    """

    def __init__(
        self, parts: Sequence[OutputPart], in_features: int, context: LayerContext, *, has_bias: bool = False
    ) -> None:
        self._linear = context.kernels.linear
        columns = range(in_features)
        self.weight = Parameter(
            [
                TensorSlice(name=f"{part.name}.weight", shape=(part.size, in_features), rows=part.rows, columns=columns)
                for part in parts
            ],
            is_quantizable=True,
        )
        biases = [vector_slice(f"{part.name}.bias", part.size, part.rows) for part in parts]
        self.bias = Parameter(biases) if has_bias else None

    def __call__(self, x: Tensor, *, out_dtype: torch.dtype | None = None) -> Tensor:
        bias = None if self.bias is None else self.bias.vector
        return self._linear(x, self.weight.weight, bias, out_dtype=out_dtype)

    def parameters(self) -> Iterator[Parameter]:
        yield self.weight
        if self.bias is not None:
            yield self.bias


class RowParallelLinear:
    """y = sum over ranks of x_local W_local^T, + b: each rank holds some inputs; one all-reduce joins the outputs.

    site: that of the all-reduce in the ledger.

    Shapes:
        x:       [num_tokens, local part of in_features]
        returns: [num_tokens, out_features], the same on every rank
    """

    def __init__(
        self,
        name: str,
        out_features: int,
        in_features: int,
        context: LayerContext,
        *,
        columns: range,
        site: str,
        has_bias: bool = False,
    ) -> None:
        self._linear = context.kernels.linear
        self._group = context.tp_group
        self._site = site
        self._partial_dtype = context.partial_dtype
        shape = (out_features, in_features)
        self.weight = Parameter(
            [TensorSlice(name=f"{name}.weight", shape=shape, rows=range(out_features), columns=columns)],
            is_quantizable=True,
        )
        self.bias = Parameter([vector_slice(f"{name}.bias", out_features)]) if has_bias else None

    def __call__(self, x: Tensor) -> Tensor:
        # The bias belongs to the sum, so one rank adds it.
        adds_bias = self.bias is not None and self._group.rank == 0
        bias = self.bias.vector if self.bias is not None and adds_bias else None
        y = self._linear(x, self.weight.weight, bias, out_dtype=self._partial_dtype)
        return self._group.all_reduce(y, self._site, out_dtype=x.dtype)

    def parameters(self) -> Iterator[Parameter]:
        yield self.weight
        if self.bias is not None:
            yield self.bias
