"""This GPU at its best: a kernel that only reads, a copy, and the library's products of matrices."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from headrace.config import WeightFormat
from headrace.kernels.timing import Call, time_calls

_BLOCK = 4096
"""Entries of float32 that a program asks for at once: each of its 256 threads reads 16 bytes four times."""

_BLOCKS_PER_PROGRAM = 8
_NUM_WARPS = 8

_MIN_CALLS, _MIN_S = 24, 0.03
_PRODUCT_SIZES = {"cuda": 8192, "cpu": 64}
"""Of square matrices: on a GPU large enough to reach the peak, on a CPU (in Triton's interpreter) of no meaning."""

_CPU_BUFFER_BYTES = 2**20


class MachineOps:
    """Inputs are random, since products of zeros draw less power and run faster than any real ones.

    In Triton's interpreter figures are of the interpreter.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def read_bytes_per_s(self, buffer_bytes: int) -> float:
        """The better one of reading a buffer and of copying one, where bytes read and bytes written count."""
        return max(self.scan_bytes_per_s(buffer_bytes), self.copy_bytes_per_s(buffer_bytes))

    def scan_bytes_per_s(self, buffer_bytes: int) -> float:
        buffer = self._buffer(buffer_bytes)
        out = torch.empty(triton.cdiv(buffer.numel(), _BLOCK * _BLOCKS_PER_PROGRAM), device=self._device)
        return buffer.nbytes / self._best_s(lambda: scan(buffer, out))

    def copy_bytes_per_s(self, buffer_bytes: int) -> float:
        source = self._buffer(buffer_bytes)
        target = torch.empty_like(source)
        return 2 * source.nbytes / self._best_s(lambda: target.copy_(source))

    def multiply_ops_per_s(self, weight_format: WeightFormat) -> tuple[str, float]:
        """Integer weights are multiplied as bfloat16, into which kernels convert them in registers."""
        dtype = torch.float32 if weight_format is WeightFormat.FLOAT32 else torch.bfloat16
        size = _PRODUCT_SIZES[self._device.type]
        a, b = (torch.randn(size, size, dtype=dtype, device=self._device) for _ in range(2))
        out = torch.empty_like(a)
        return str(dtype).removeprefix("torch."), 2 * size**3 / self._best_s(lambda: torch.mm(a, b.T, out=out))

    def _buffer(self, buffer_bytes: int) -> Tensor:
        if self._device.type == "cpu":
            buffer_bytes = min(buffer_bytes, _CPU_BUFFER_BYTES)
        return torch.randn(max(1, buffer_bytes // 4), device=self._device)

    def _best_s(self, call: Call) -> float:
        is_gpu = self._device.type == "cuda"
        calls = time_calls([call], self._device)
        return calls.best_s(min_calls=_MIN_CALLS if is_gpu else 1, min_s=_MIN_S if is_gpu else 0.0)


def scan(buffer: Tensor, out: Tensor) -> None:
    """Read all of a buffer; out: one sum for each program, so that no load can be left out.

    Shapes: buffer: [n] float32; out: [ceil(n / (_BLOCK * _BLOCKS_PER_PROGRAM))] float32
    """
    _scan_kernel[(len(out),)](
        buffer, out, buffer.numel(), BLOCK=_BLOCK, BLOCKS_PER_PROGRAM=_BLOCKS_PER_PROGRAM, num_warps=_NUM_WARPS
    )


@triton.jit
def _scan_kernel(buffer_ptr, out_ptr, n, BLOCK: tl.constexpr, BLOCKS_PER_PROGRAM: tl.constexpr):
    program = tl.program_id(0)
    start = program.to(tl.int64) * (BLOCK * BLOCKS_PER_PROGRAM)
    offsets = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for i in tl.static_range(BLOCKS_PER_PROGRAM):
        index = start + i * BLOCK + offsets
        total += tl.load(buffer_ptr + index, mask=index < n, other=0.0)
    tl.store(out_ptr + program, tl.sum(total))
