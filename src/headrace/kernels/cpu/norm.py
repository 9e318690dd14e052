"""Normalization, with the residual addition before it."""

from torch import Tensor

from headrace import _native
from headrace.errors import ShapeError
from headrace.kernels.cpu.dtypes import native_dtype
from headrace.kernels.cpu.stream import Stream
from headrace.kernels.cpu.targets import native_target


class Norm:
    """`rms_norm`, `layer_norm` and `add_` of the reference, on one instruction set. A row's result depends on that row
    alone, to the bit."""

    def __init__(self, target: str, stream: Stream) -> None:
        self._target = native_target(target)
        self._stream = stream

    def rms_norm(
        self, x: Tensor, weight: Tensor, *, eps: float, unit_offset: bool = False, residual: Tensor | None = None
    ) -> Tensor:
        return self._run(_native.NormKind.RMS, x, residual, (weight, None), eps, unit_offset)

    def layer_norm(
        self, x: Tensor, weight: Tensor, bias: Tensor, *, eps: float, residual: Tensor | None = None
    ) -> Tensor:
        return self._run(_native.NormKind.LAYER, x, residual, (weight, bias), eps, False)

    def add_(self, residual: Tensor, x: Tensor) -> None:
        _check_contiguous(residual, x)
        _native.add(
            self._stream.native,
            self._target,
            native_dtype(x.dtype),
            x.numel(),
            x.data_ptr(),
            residual.data_ptr(),
        )

    def _run(
        self,
        kind: _native.NormKind,
        x: Tensor,
        residual: Tensor | None,
        parameters: tuple[Tensor, Tensor | None],
        eps: float,
        unit_offset: bool,
    ) -> Tensor:
        weight, bias = parameters
        _check_parameters(x, weight, bias)
        if residual is not None:
            _check_contiguous(residual, x)
        num_outer, num_inner, outer_stride, inner_stride = _rows(x)
        out = self._stream.empty(x.shape, x.dtype)
        _native.norm(
            self._stream.native,
            self._target,
            kind,
            native_dtype(x.dtype),
            num_outer,
            num_inner,
            outer_stride,
            inner_stride,
            x.shape[-1],
            x.data_ptr(),
            0 if residual is None else residual.data_ptr(),
            weight.data_ptr(),
            0 if bias is None else bias.data_ptr(),
            eps,
            unit_offset,
            out.data_ptr(),
        )
        return out


def _rows(x: Tensor) -> tuple[int, int, int, int]:
    """Sizes and strides of the one or two dimensions before the last."""
    if x.dim() not in (2, 3) or (x.stride(-1) != 1 and x.shape[-1] != 1):
        raise ShapeError(
            f"norm of {list(x.shape)} with strides {x.stride()}; want 2 or 3 dimensions, the last adjacent"
        )
    if x.dim() == 2:
        return x.shape[0], 1, x.stride(0), 0
    return x.shape[0], x.shape[1], x.stride(0), x.stride(1)


def _check_parameters(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    for parameter in (weight,) if bias is None else (weight, bias):
        if parameter.shape != x.shape[-1:] or parameter.dtype != x.dtype or not parameter.is_contiguous():
            raise ShapeError(
                f"norm of {list(x.shape)} {x.dtype} with a weight or bias of {list(parameter.shape)} {parameter.dtype}"
            )


def _check_contiguous(residual: Tensor, x: Tensor) -> None:
    if residual.shape != x.shape or residual.dtype != x.dtype:
        raise ShapeError(f"residual is {list(residual.shape)} {residual.dtype}, x {list(x.shape)} {x.dtype}")
    if not (residual.is_contiguous() and x.is_contiguous()):
        raise ShapeError("x and the residual it is added to must be contiguous")
