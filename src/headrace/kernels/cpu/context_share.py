"""What ranks that share a context do with their queries and shares (native/context_share.h)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from headrace import _native
from headrace.errors import KernelError, ShapeError
from headrace.kernels.cpu.dtypes import native_dtype
from headrace.kernels.cpu.stream import Stream
from headrace.kernels.cpu.targets import native_target
from headrace.kernels.ops import AttentionShare
from headrace.kernels.token_heads import by_token


class ContextShare:
    """`join_heads` and `weigh_share` of the reference, on one instruction set."""

    def __init__(self, target: str, stream: Stream) -> None:
        self._target = native_target(target)
        self._stream = stream

    def join_heads(self, parts: Sequence[Tensor]) -> Tensor:
        """
        Raises:
            ShapeError: parts of different shapes.
        """
        first = parts[0]
        if any(part.shape != first.shape or part.dtype != first.dtype for part in parts):
            raise ShapeError(f"parts of {[list(part.shape) for part in parts]}; all must be of one shape and type")
        parts = [by_token(part) for part in parts]
        num_tokens, num_heads, head_dim = first.shape
        out = self._stream.empty((num_tokens, num_heads * len(parts), head_dim), first.dtype)
        _native.join_heads(
            self._stream.native,
            [part.data_ptr() for part in parts],
            [part.stride(0) * part.itemsize for part in parts],
            num_tokens,
            num_heads * head_dim * first.itemsize,
            out.data_ptr(),
        )
        return out

    def weigh_share(
        self, share: AttentionShare, normalizers: Sequence[Tensor], rank: int, *, dtype: torch.dtype, num_parts: int = 1
    ) -> Tensor:
        """
        Raises:
            ShapeError: normalizers that are not those of the share's tokens and heads, or heads that do not divide.
            KernelError: tensors that are not float32.
        """
        num_tokens, num_heads, head_dim = share.numerators.shape
        expected = num_tokens, num_heads, 2
        if any(tuple(x.shape) != expected for x in normalizers) or num_heads % num_parts:
            raise ShapeError(
                f"normalizers of {[list(x.shape) for x in normalizers]} for {num_parts} parts; allowed: "
                f"{list(expected)}, heads divided by the parts"
            )
        if {x.dtype for x in (*normalizers, share.numerators)} != {torch.float32}:
            raise KernelError("numerators and normalizers must be float32")
        numerators = share.numerators.contiguous()
        normalizers = [x.contiguous() for x in normalizers]
        out = self._stream.empty((num_parts, num_tokens, num_heads // num_parts, head_dim), dtype)
        _native.weigh_share(
            self._stream.native,
            self._target,
            [x.data_ptr() for x in normalizers],
            rank,
            num_tokens,
            num_heads,
            head_dim,
            num_parts,
            numerators.data_ptr(),
            native_dtype(dtype),
            out.data_ptr(),
        )
        return out
