"""What torch reaches on this machine: the limit that models on the reference kernels are compared with."""

import time
from collections.abc import Callable

import torch

from headrace.config import WeightFormat

_ROW_ELEMENTS = 4096
_NUM_PASSES = 6
_SHAPE = (512, 2048, 4096)
"""[512 tokens, 2048] times [2048, 4096]: a prefill's shape, 8.6 GFLOP."""


class MachineOps:
    def read_bytes_per_s(self, buffer_bytes: int) -> float:
        """Two ways of reading a buffer once (a sum, and a product with a vector), repeated; the best pass counts."""
        num_rows = max(1, buffer_bytes // (4 * _ROW_ELEMENTS))
        # Written to, so that every page is really there.
        buffer = torch.ones(num_rows, _ROW_ELEMENTS)
        vector, out = torch.ones(_ROW_ELEMENTS), torch.empty(num_rows)
        return buffer.nbytes / min(_best_s(buffer.sum), _best_s(lambda: torch.mv(buffer, vector, out=out)))

    def multiply_ops_per_s(self, weight_format: WeightFormat) -> tuple[str, float]:
        """Integer weights count as bfloat16, the faster one of what they may be converted to."""
        dtype = torch.float32 if weight_format is WeightFormat.FLOAT32 else torch.bfloat16
        m, k, n = _SHAPE
        a, b = torch.full((m, k), 0.5, dtype=dtype), torch.full((n, k), 0.5, dtype=dtype)
        return str(dtype).removeprefix("torch."), 2 * m * k * n / _best_s(lambda: a @ b.T)


def _best_s(run: Callable[[], object]) -> float:
    best = float("inf")
    with torch.inference_mode():
        for _ in range(_NUM_PASSES):
            start = time.perf_counter()
            run()
            best = min(best, time.perf_counter() - start)
    return best
