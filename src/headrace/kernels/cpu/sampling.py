"""What sampling asks of rows of logits."""

import torch
from torch import Tensor

from headrace import _native
from headrace.errors import ShapeError
from headrace.kernels.cpu.stream import Stream
from headrace.kernels.cpu.targets import native_target


class Sampling:
    """`argmax`, `log_sum_exp` and `top_k` of the reference, on one instruction set. Each row's answer depends on that
    row alone, to the bit."""

    def __init__(self, target: str, stream: Stream) -> None:
        self._target = native_target(target)
        self._stream = stream

    def argmax(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        logits = _checked(logits)
        ids = torch.empty(len(logits), dtype=torch.int64)
        values = torch.empty(len(logits))
        _native.argmax(self._stream.native, self._target, *_view(logits), ids.data_ptr(), values.data_ptr())
        return ids, values

    def log_sum_exp(self, logits: Tensor) -> Tensor:
        logits = _checked(logits)
        out = torch.empty(len(logits))
        _native.log_sum_exp(self._target, *_view(logits), out.data_ptr())
        return out

    def top_k(self, logits: Tensor, k: int) -> Tensor:
        logits = _checked(logits)
        k = min(k, logits.shape[1])
        ids = torch.empty(len(logits), k, dtype=torch.int64)
        _native.top_k(self._target, *_view(logits), k, ids.data_ptr())
        return ids


def _view(logits: Tensor) -> tuple[int, int, int, int]:
    return logits.data_ptr(), logits.shape[0], logits.stride(0), logits.shape[1]


def _checked(logits: Tensor) -> Tensor:
    if logits.dim() != 2 or logits.shape[1] == 0 or logits.dtype != torch.float32:
        raise ShapeError(f"logits are {list(logits.shape)} {logits.dtype}; want [num_rows, vocab_size] float32")
    return logits if logits.stride(1) == 1 else logits.contiguous()
