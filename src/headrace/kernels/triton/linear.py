"""Matrix products with weights as stored, by the implementation that the dataflow chooses."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from headrace.errors import KernelError, ShapeError
from headrace.kernels.dataflow import Dataflow
from headrace.kernels.triton.blocked_flat_gemm import launch_blocked_flat_gemm
from headrace.kernels.triton.blocked_gemv import launch_blocked_gemv
from headrace.kernels.triton.flat_gemm import launch_flat_gemm
from headrace.kernels.triton.gather import dequantize_rows
from headrace.kernels.triton.gemv import launch_gemv
from headrace.kernels.triton.limits import device_limits
from headrace.kernels.triton.split_k import SplitCounters
from headrace.kernels.triton.weights import blocked
from headrace.kernels.tuning import LinearArm, Tiles
from headrace.kernels.weights import BlockedWeight, DenseWeight, Weight

DEQUANTIZED_BYTES = 32 * 2**20
"""Of a quantized weight expanded at once for the library: the next product finds it in the L2 cache of an H100."""

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Linear:
    """x W^T + bias on a GPU; a quantized W stands for `reference.dequantize`, and activations keep their type.

    Within one implementation a row's result depends on that row and on the number its batch is filled up to (8, 16, 32
    or 64 rows; 1, 2 or 4 for GEMV), never on what the other rows hold: K is split alike for every number of rows.
    Different implementations add in different orders, and the library chooses its own for each number of rows.
    """

    def __init__(self, device: torch.device, dataflow: Dataflow) -> None:
        self._dataflow = dataflow
        self._limits = device_limits(device)
        self._counters = SplitCounters(device)

    def __call__(
        self,
        x: Tensor,
        weight: Weight,
        bias: Tensor | None = None,
        *,
        out_dtype: torch.dtype | None = None,
        arm: LinearArm | None = None,
    ) -> Tensor:
        """out_dtype: that of x if None; float32 keeps all of the accumulators.

        Shapes:
            x:       [..., K]; the dtype of W if that is floating point
            weight:  [N, K], dense or blocked
            bias:    [N]
            returns: [..., N]
        Raises:
            ShapeError: x, weight and bias do not fit together.
            KernelError: dtypes that do not, or a weight in another layout.
        """
        check_linear(x, weight, bias)
        out_dtype = out_dtype or x.dtype
        rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
        if rows.stride(1) != 1 and rows.shape[1] > 1:
            rows = rows.contiguous()
        bias = None if bias is None else bias.contiguous()
        shape = (weight if isinstance(weight, DenseWeight) else blocked(weight)).linear_shape
        if len(rows) == 0 or shape.out_features == 0:
            return x.new_empty(*x.shape[:-1], shape.out_features, dtype=out_dtype)
        arm = arm or self._dataflow.arm(shape, len(rows))
        if arm is LinearArm.GEMM:
            out = _library_gemm(rows, weight, bias, out_dtype)
        else:
            out = torch.empty(len(rows), shape.out_features, dtype=out_dtype, device=x.device)
            self._launch(rows, weight, bias, out, arm, self._dataflow.tiles(shape, arm))
        return out if x.dim() == 2 else out.view(*x.shape[:-1], shape.out_features)

    def _launch(
        self, x: Tensor, weight: Weight, bias: Tensor | None, out: Tensor, arm: LinearArm, tiles: Tiles
    ) -> None:
        if isinstance(weight, DenseWeight):
            if arm is LinearArm.GEMV:
                launch_gemv(x, weight.data, bias, out, tiles)
            else:
                launch_flat_gemm(x, weight.data, bias, out, tiles, self._counters, self._limits)
        elif arm is LinearArm.GEMV:
            launch_blocked_gemv(x, blocked(weight), bias, out, tiles)
        else:
            launch_blocked_flat_gemm(x, blocked(weight), bias, out, tiles, self._counters, self._limits)


def _library_gemm(x: Tensor, weight: Weight, bias: Tensor | None, out_dtype: torch.dtype) -> Tensor:
    """cuBLAS on a GPU. Where the result is wider than x it is so from the accumulators on."""
    if isinstance(weight, DenseWeight) and out_dtype == x.dtype:
        return F.linear(x, weight.data, bias)
    out = torch.empty(len(x), weight.shape[0], dtype=out_dtype, device=x.device)
    for rows, w in _dense_parts(weight, x.dtype):
        part = out[:, rows.start : rows.stop]
        if out_dtype == x.dtype:
            torch.mm(x, w.T, out=part)
        else:
            part.copy_(torch.mm(x, w.T, out_dtype=out_dtype) if x.is_cuda else x.to(out_dtype) @ w.to(out_dtype).T)
    return out if bias is None else out.add_(bias)


def _dense_parts(weight: Weight, dtype: torch.dtype) -> Iterator[tuple[range, Tensor]]:
    """A weight as dense rows: a dense one at once, a quantized one by parts in memory that the next part reuses.

    Reads 0.5 or 1 byte and writes and reads 2 for each weight. On an H100 that takes as long as 300 rows' products do
    at twice this time's share; below, flat GEMM reads the weight again for every 64 rows, from the L2 cache.
    """
    if isinstance(weight, DenseWeight):
        yield range(weight.shape[0]), weight.data
        return
    weight = blocked(weight)
    num_rows, num_columns = weight.shape
    step = max(1, DEQUANTIZED_BYTES // (max(1, num_columns) * dtype.itemsize))
    expanded = torch.empty(min(step, num_rows), num_columns, dtype=dtype, device=weight.values.device)
    for start in range(0, num_rows, step):
        rows = range(start, min(start + step, num_rows))
        dequantize_rows(weight, rows, expanded[: len(rows)])
        yield rows, expanded[: len(rows)]


def check_linear(x: Tensor, weight: Weight, bias: Tensor | None) -> None:
    if not isinstance(weight, DenseWeight | BlockedWeight):
        blocked(weight)
    num_outputs, num_inputs = weight.shape
    if x.shape[-1] != num_inputs:
        raise ShapeError(f"input has {x.shape[-1]} columns, the weight takes {num_inputs}")
    if isinstance(weight, DenseWeight) and x.dtype != weight.data.dtype:
        raise KernelError(f"input is {x.dtype}, the weight {weight.data.dtype}; allowed: the same for both")
    if x.dtype not in _DTYPES:
        raise KernelError(f"input is {x.dtype}; allowed: {', '.join(map(str, _DTYPES))}")
    if bias is not None and bias.shape != (num_outputs,):
        raise ShapeError(f"bias is {list(bias.shape)} instead of [{num_outputs}]")
