"""Feed-forward activations."""

from torch import Tensor

from headrace import _native
from headrace.config import Activation
from headrace.kernels.cpu.dtypes import native_dtype
from headrace.kernels.cpu.stream import Stream
from headrace.kernels.cpu.targets import native_target

ACTIVATION_KINDS = {
    Activation.SILU: _native.ActivationKind.SILU,
    Activation.GELU: _native.ActivationKind.GELU,
    Activation.GELU_TANH: _native.ActivationKind.GELU_TANH,
    Activation.RELU: _native.ActivationKind.RELU,
}


class Activate:
    """`activation` and `gated_activation` of the reference, on one instruction set."""

    def __init__(self, target: str, stream: Stream) -> None:
        self._target = native_target(target)
        self._stream = stream

    def activation(self, x: Tensor, kind: Activation) -> Tensor:
        return self._run(x, kind, is_gated=False)

    def gated_activation(self, x: Tensor, kind: Activation) -> Tensor:
        return self._run(x, kind, is_gated=True)

    def _run(self, x: Tensor, kind: Activation, *, is_gated: bool) -> Tensor:
        x = x.contiguous()
        size = x.shape[-1] // 2 if is_gated else x.shape[-1]
        out = self._stream.empty((*x.shape[:-1], size), x.dtype)
        _native.activation(
            self._stream.native,
            self._target,
            ACTIVATION_KINDS[kind],
            is_gated,
            native_dtype(x.dtype),
            x.numel() // x.shape[-1],
            size,
            x.data_ptr(),
            out.data_ptr(),
        )
        return out
