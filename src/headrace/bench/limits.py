"""What this machine can do at best, measured now with the engine's threads: read memory and multiply matrices."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from headrace.machine import available_memory_bytes

_BUFFER_BYTES = 512 * 2**20
"""Larger than the last-level cache of any CPU by enough that what stays in it does not matter."""
_ROW_ELEMENTS = 4096
_READ_PASSES = 6
_MATMUL_PASSES = 6
_MATMUL_SHAPE = (512, 2048, 4096)
"""[512 tokens, 2048] times [2048, 4096]: a prefill's shape, 8.6 GFLOP."""


@dataclass(frozen=True, kw_only=True)
class MachineLimits:
    """read_gb_per_s: 1e9 bytes; matmul_gflops: 1e9 operations a second, a multiply and an add counted as two.

    matmul_gflops is by dtype: the activations', and float32, which is the faster one on CPUs without instructions for
    the former.
    """

    read_gb_per_s: float
    read_buffer_bytes: int
    matmul_gflops: dict[str, float]
    num_threads: int

    @property
    def best_gflops(self) -> float:
        return max(self.matmul_gflops.values())


def measure_limits(dtype: torch.dtype, on_start: Callable[[str], None]) -> MachineLimits:
    """Best of several passes each, with torch's current thread count. Takes a few seconds."""
    on_start("limits: memory bandwidth")
    buffer_bytes = min(_BUFFER_BYTES, available_memory_bytes() // 4)
    read_gb_per_s = _read_gb_per_s(buffer_bytes)
    matmul_gflops = {}
    for tried in dict.fromkeys((dtype, torch.float32)):
        name = str(tried).removeprefix("torch.")
        on_start(f"limits: {name} matrix multiplication")
        matmul_gflops[name] = _matmul_gflops(tried)
    return MachineLimits(
        read_gb_per_s=read_gb_per_s,
        read_buffer_bytes=buffer_bytes,
        matmul_gflops=matmul_gflops,
        num_threads=torch.get_num_threads(),
    )


def _read_gb_per_s(buffer_bytes: int) -> float:
    """Two ways of reading a buffer once (a sum, and a product with a vector); the faster one is the machine's."""
    num_rows = max(1, buffer_bytes // (4 * _ROW_ELEMENTS))
    # Written to, so that every page is really there.
    buffer = torch.ones(num_rows, _ROW_ELEMENTS)
    vector, out = torch.ones(_ROW_ELEMENTS), torch.empty(num_rows)
    seconds = min(
        _best_s(buffer.sum, _READ_PASSES),
        _best_s(lambda: torch.mv(buffer, vector, out=out), _READ_PASSES),
    )
    return buffer.nbytes / seconds / 1e9


def _matmul_gflops(dtype: torch.dtype) -> float:
    m, k, n = _MATMUL_SHAPE
    a, b = torch.full((m, k), 0.5, dtype=dtype), torch.full((n, k), 0.5, dtype=dtype)
    return 2 * m * k * n / _best_s(lambda: a @ b.T, _MATMUL_PASSES) / 1e9


def _best_s(run: Callable[[], object], num_passes: int) -> float:
    best = float("inf")
    with torch.inference_mode():
        for _ in range(num_passes):
            start = time.perf_counter()
            run()
            best = min(best, time.perf_counter() - start)
    return best
