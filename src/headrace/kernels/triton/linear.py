"""Matrix products with weights as stored, by the implementation that the dataflow chooses."""

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from headrace.config import WeightFormat
from headrace.errors import KernelError, ShapeError
from headrace.kernels.dataflow import Dataflow
from headrace.kernels.triton.flat_gemm import block_rows, launch_flat_gemm
from headrace.kernels.triton.gemv import launch_gemv
from headrace.kernels.triton.limits import device_limits
from headrace.kernels.triton.split_k import SplitCounters
from headrace.kernels.triton.tiles import pipeline_stages
from headrace.kernels.tuning import LinearArm, LinearShape
from headrace.kernels.weights import DenseWeight, Weight

_FORMATS = {
    torch.float32: WeightFormat.FLOAT32,
    torch.bfloat16: WeightFormat.BFLOAT16,
    torch.float16: WeightFormat.BFLOAT16,  # no format of its own; tiles follow from the size
}


class Linear:
    """x W^T + bias on a GPU.

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
            weight:  [N, K]
            bias:    [N]
            returns: [..., N]
        Raises:
            ShapeError: x, weight and bias do not fit together.
            KernelError: dtypes that do not.
        """
        check_linear(x, weight, bias)
        rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
        if rows.stride(1) != 1 and rows.shape[1] > 1:
            rows = rows.contiguous()
        num_rows, num_outputs = rows.shape[0], weight.shape[0]
        if num_rows == 0 or num_outputs == 0:
            return x.new_empty(*x.shape[:-1], num_outputs, dtype=out_dtype or x.dtype)
        bias = None if bias is None else bias.contiguous()
        assert isinstance(weight, DenseWeight)
        out = self._dense(rows, weight, bias, out_dtype or x.dtype, arm)
        return out if x.dim() == 2 else out.view(*x.shape[:-1], num_outputs)

    def _dense(
        self, x: Tensor, weight: DenseWeight, bias: Tensor | None, out_dtype: torch.dtype, arm: LinearArm | None
    ) -> Tensor:
        w = weight.data
        shape = LinearShape(weight_format=_FORMATS[w.dtype], out_features=w.shape[0], in_features=w.shape[1])
        arm = arm or self._dataflow.arm(shape, len(x))
        if arm is LinearArm.GEMM:
            return _library_gemm(x, w, bias, out_dtype)
        out = torch.empty(len(x), len(w), dtype=out_dtype, device=x.device)
        tiles = self._dataflow.tiles(shape, arm)
        if arm is LinearArm.GEMV:
            launch_gemv(x, w, bias, out, tiles)
        else:
            stage_bytes = (tiles.block_n + block_rows(len(x))) * tiles.block_k * w.element_size()
            tiles = replace(tiles, num_stages=pipeline_stages(tiles, stage_bytes, self._limits))
            launch_flat_gemm(x, w, bias, out, tiles, self._counters)
        return out


def _library_gemm(x: Tensor, w: Tensor, bias: Tensor | None, out_dtype: torch.dtype) -> Tensor:
    """cuBLAS on a GPU. Where the result is wider than x it is so from the accumulators on."""
    if out_dtype == x.dtype:
        return F.linear(x, w, bias)
    out = torch.mm(x, w.T, out_dtype=out_dtype) if x.is_cuda else x.to(out_dtype) @ w.to(out_dtype).T
    return out if bias is None else out.add_(bias)


def check_linear(x: Tensor, weight: Weight, bias: Tensor | None) -> None:
    num_outputs, num_inputs = weight.shape
    if x.shape[-1] != num_inputs:
        raise ShapeError(f"input has {x.shape[-1]} columns, the weight takes {num_inputs}")
    if isinstance(weight, DenseWeight) and x.dtype != weight.data.dtype:
        raise KernelError(f"input is {x.dtype}, the weight {weight.data.dtype}; allowed: the same for both")
    if bias is not None and bias.shape != (num_outputs,):
        raise ShapeError(f"bias is {list(bias.shape)} instead of [{num_outputs}]")
