"""Matrix products and row lookups on packed weights."""

import torch
from torch import Tensor

from headrace import _native
from headrace.config import WeightFormat
from headrace.errors import KernelError, ShapeError
from headrace.kernels.cpu.dtypes import DTYPES, native_dtype
from headrace.kernels.cpu.stream import Stream
from headrace.kernels.cpu.targets import check_target
from headrace.kernels.dataflow import Dataflow
from headrace.kernels.tuning import LinearArm
from headrace.kernels.weights import PackedWeight, Weight

Arm = _native.Arm

_DENSE_DTYPES = {WeightFormat.FLOAT32: torch.float32, WeightFormat.BFLOAT16: torch.bfloat16}
_ARMS = {
    LinearArm.GEMV: Arm.GEMV,
    LinearArm.FLAT_GEMM: Arm.FLAT_GEMM,
    LinearArm.GEMM: Arm.GEMM,
}


class Linear:
    """x W^T + bias for packed weights, on one instruction set.

    With an integer W, x is quantized on the fly to int8 in groups along K (`reference.linear_int8_activations`), or
    rounded to float16 where tiles take that (`reference.linear_float16_activations`; `has_float16_tiles`). A row's
    result depends on that row alone, to the bit, whatever the implementation.

    batch_invariant: False lets implementations differ in that: where there are such tiles, GEMV and flat GEMM take int8
        all the same, which is faster for one row or two.

    Raises:
        BackendUnavailable: an instruction set this machine cannot run.
    """

    def __init__(
        self, target: str, stream: Stream, dataflow: Dataflow | None = None, *, batch_invariant: bool = True
    ) -> None:
        check_target(target)
        self.target = target
        self._stream = stream
        self._dataflow = dataflow or Dataflow()
        self._native = _native.Linear(target, batch_invariant)

    def __call__(
        self,
        x: Tensor,
        weight: Weight,
        bias: Tensor | None = None,
        *,
        out_dtype: torch.dtype | None = None,
        arm: Arm | None = None,
    ) -> Tensor:
        """out_dtype: that of x if None; float32 keeps all of the accumulators.

        Shapes:
            x:       [..., K] float32 or bfloat16; the dtype of W if that is floating point
            weight:  [N, K] packed
            bias:    [N], dtype of x
            returns: [..., N]
        Raises:
            ShapeError: x, weight and bias do not fit together.
            KernelError: dtypes that do not, or a weight that is not packed.
        """
        weight = packed(weight)
        check_linear(x, weight, bias)
        rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
        if rows.stride(1) != 1 or (rows.shape[0] > 1 and rows.stride(0) < rows.shape[1]):
            rows = rows.contiguous()
        out_dtype = out_dtype or x.dtype
        out = self._stream.empty((*x.shape[:-1], weight.shape[0]), out_dtype)
        if bias is not None:
            bias = bias.contiguous()
        self._native.run(
            self._stream.native,
            arm or self._choose_arm(weight, rows.shape[0]),
            weight.matrix,
            DTYPES[x.dtype],
            rows.shape[0],
            rows.data_ptr(),
            rows.stride(0),
            0 if bias is None else bias.data_ptr(),
            out.data_ptr(),
            native_dtype(out_dtype),
        )
        return out

    def _choose_arm(self, weight: PackedWeight, num_rows: int) -> Arm:
        return _ARMS[self._dataflow.arm(weight.linear_shape, num_rows)]


class Embedding:
    """scale * W[ids + offset] for packed weights, in the dtype of activations."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream

    def __call__(
        self,
        ids: Tensor,
        weight: Weight,
        *,
        dtype: torch.dtype,
        scale: float = 1.0,
        offset: int = 0,
        zeros_outside: bool = False,
    ) -> Tensor:
        """zeros_outside: an id that is not in the weight gives zeros.

        Shapes:
            ids:     [num_tokens] int64
            weight:  [vocab_size, size] packed
            returns: [num_tokens, size] of `dtype`
        Raises:
            IndexError: an id outside the vocabulary, unless that gives zeros.
        """
        weight = packed(weight)
        ids = ids.long().contiguous()
        out = self._stream.empty((*ids.shape, weight.shape[1]), dtype)
        _native.embedding(
            self._stream.native,
            weight.matrix,
            native_dtype(dtype),
            ids.numel(),
            ids.data_ptr(),
            offset,
            scale,
            zeros_outside,
            out.data_ptr(),
        )
        return out


def packed(weight: Weight) -> PackedWeight:
    if not isinstance(weight, PackedWeight):
        raise KernelError(f"the cpu kernels take packed weights, not {type(weight).__name__}")
    return weight


def check_linear(x: Tensor, weight: PackedWeight, bias: Tensor | None) -> None:
    num_outputs, num_inputs = weight.shape
    if x.shape[-1] != num_inputs:
        raise ShapeError(f"input has {x.shape[-1]} columns, the weight takes {num_inputs}")
    if x.dtype not in DTYPES or x.dtype != _DENSE_DTYPES.get(weight.weight_format, x.dtype):
        raise KernelError(f"input is {x.dtype}, the weight {weight.weight_format.value}; allowed: float32 and bfloat16")
    if bias is not None and (bias.shape != (num_outputs,) or bias.dtype != x.dtype):
        raise ShapeError(f"bias is {list(bias.shape)} {bias.dtype} instead of [{num_outputs}] {x.dtype}")
