"""Sums of several programs in a fixed order, without float atomics: the last one to arrive adds up what all have left.

A launch of its own for the sum would cost about as much as a tenth of a small layer. Counters are integers, so who
comes last changes who adds, not the order: partial sums are added from split 0 up.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def finish(
    out,
    m,
    n,
    bias_ptr,
    out_ptr,
    partial_ptr,
    num_arrived_ptr,
    num_rows,
    N,
    HAS_BIAS: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Store `out` + bias, or with several splits leave it as a partial sum and let the last program do so for all.

    Grid: (blocks of N, blocks of M, splits).
    """
    if NUM_SPLITS == 1:
        _store(out, m, n, bias_ptr, out_ptr, num_rows, N, HAS_BIAS)
    else:
        tile = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
        size: tl.constexpr = BLOCK_M * BLOCK_N
        place = tl.arange(0, BLOCK_N)[:, None] * BLOCK_M + tl.arange(0, BLOCK_M)[None, :]
        partial_ptrs = partial_ptr + tile.to(tl.int64) * (NUM_SPLITS * size) + place
        tl.store(partial_ptrs + tl.program_id(2) * size, out)
        # All of this program's lanes have stored before one of them says so, with release and acquire.
        tl.debug_barrier()
        num_arrived = tl.atomic_add(num_arrived_ptr + tile, 1, sem="acq_rel", scope="gpu")
        if num_arrived == NUM_SPLITS - 1:
            total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
            for split in tl.static_range(NUM_SPLITS):
                # From the L2 cache, where other multiprocessors' stores are.
                total += tl.load(partial_ptrs + split * size, cache_modifier=".cg")
            _store(total, m, n, bias_ptr, out_ptr, num_rows, N, HAS_BIAS)
            # For the next launch; nobody else looks at this counter any more.
            tl.store(num_arrived_ptr + tile, 0)


@triton.jit
def _store(out, m, n, bias_ptr, out_ptr, num_rows, N, HAS_BIAS: tl.constexpr):
    if HAS_BIAS:
        out += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)[:, None]
    places = m.to(tl.int64)[None, :] * N + n[:, None]
    tl.store(out_ptr + places, out, mask=(n[:, None] < N) & (m[None, :] < num_rows))


class SplitCounters:
    """Counters that are zero before and after each launch. Launches that share them must follow one another.

    Owns: one int32 for each tile of a launch with several splits.
    """

    _SIZE = 2**14

    def __init__(self, device: torch.device) -> None:
        self._counters = torch.zeros(self._SIZE, dtype=torch.int32, device=device)

    def of(self, num_tiles: int) -> Tensor:
        if num_tiles <= self._SIZE:
            return self._counters
        return torch.zeros(num_tiles, dtype=torch.int32, device=self._counters.device)
