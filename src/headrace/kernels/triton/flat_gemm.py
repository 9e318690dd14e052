"""Flat GEMM on a GPU: C^T = W x^T on the tensor cores, rows of a dense W on their long side and the batch on the short.

A tensor core takes 16 (sm_80) or 64 (sm_90) rows of W and as few as 8 of x, so a batch is filled up to 8, 16, 32 or 64
rows, where a library's tiles begin at 64.

Source: FlashDecoding++ (arXiv:2311.01282), section 4.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from headrace.kernels.triton.launch import is_interpreted
from headrace.kernels.triton.limits import DeviceLimits
from headrace.kernels.triton.split_k import SplitCounters, finish
from headrace.kernels.triton.tiles import pipeline_stages
from headrace.kernels.tuning import Tiles

MAX_BLOCK_ROWS = 64


@triton.jit(do_not_specialize=["num_rows"])
def flat_gemm_kernel(
    x_ptr,
    w_ptr,
    bias_ptr,
    out_ptr,
    partial_ptr,
    num_arrived_ptr,
    num_rows,
    N,
    K,
    k_per_split,
    x_row_stride,
    w_row_stride,
    HAS_BIAS: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    NUM_STAGES: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
):
    """out[m, n] = sum over k of x[m, k] * w[n, k], + bias[n].

    Grid: (blocks of N, blocks of M, splits of K). Tiles of W and x come to shared memory NUM_STAGES - 1 ahead of the
    products, 16 bytes a lane (cp.async).
    Traffic: W once for each block of M, x once for each block of N, from the L2 cache.
    """
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    k_of_tile = tl.arange(0, BLOCK_K)
    k_begin = tl.program_id(2) * k_per_split
    k_end = tl.minimum(k_begin + k_per_split, K)
    x_ptrs = x_ptr + m.to(tl.int64)[None, :] * x_row_stride
    w_ptrs = w_ptr + n.to(tl.int64)[:, None] * w_row_stride
    out = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for start in tl.range(k_begin, k_end, BLOCK_K, num_stages=NUM_STAGES):
        # k_per_split is a multiple of BLOCK_K, so that only K itself can end within a tile.
        k = start + k_of_tile
        w = tl.load(w_ptrs + k[None, :], mask=(n[:, None] < N) & (k[None, :] < K), other=0.0)
        x = tl.load(x_ptrs + k[:, None], mask=(m[None, :] < num_rows) & (k[:, None] < K), other=0.0)
        out = tl.dot(w.to(DOT_DTYPE), x.to(DOT_DTYPE), out, input_precision="ieee")
    finish(
        out,
        m,
        n,
        bias_ptr,
        out_ptr,
        partial_ptr,
        num_arrived_ptr,
        num_rows,
        N,
        HAS_BIAS,
        NUM_SPLITS,
        BLOCK_M,
        BLOCK_N,
    )


def launch_flat_gemm(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    out: Tensor,
    tiles: Tiles,
    counters: SplitCounters,
    limits: DeviceLimits,
) -> None:
    """
    Shapes: x [M, K], w [N, K], bias [N], out [M, N] contiguous; neighbouring columns of x and w lie together.
    """
    (num_rows, num_outputs), num_inputs = out.shape, w.shape[1]
    block_m = block_rows(num_rows, limits)
    stage_bytes = (tiles.block_n + block_m) * tiles.block_k * w.element_size()
    k_per_split = triton.cdiv(triton.cdiv(num_inputs, tiles.num_splits), tiles.block_k) * tiles.block_k
    grid = (triton.cdiv(num_outputs, tiles.block_n), triton.cdiv(num_rows, block_m), tiles.num_splits)
    partial, num_arrived = split_workspace(grid, block_m * tiles.block_n, out, counters)
    flat_gemm_kernel[grid](
        x,
        w,
        x if bias is None else bias,
        out,
        partial,
        num_arrived,
        num_rows,
        num_outputs,
        num_inputs,
        k_per_split,
        x.stride(0),
        w.stride(0),
        HAS_BIAS=bias is not None,
        NUM_SPLITS=tiles.num_splits,
        BLOCK_M=block_m,
        BLOCK_N=tiles.block_n,
        BLOCK_K=tiles.block_k,
        NUM_STAGES=pipeline_stages(tiles, stage_bytes, limits),
        DOT_DTYPE=dot_dtype(x.dtype),
        num_warps=tiles.num_warps,
    )


def block_rows(num_rows: int, limits: DeviceLimits) -> int:
    """To how many rows a batch is filled up, or in how many rows at a time it is taken."""
    power = 1 << (num_rows - 1).bit_length()
    return min(MAX_BLOCK_ROWS, max(limits.min_product_rows, power))


def dot_dtype(dtype: torch.dtype) -> tl.dtype:
    """What tensor cores multiply. The interpreter's bfloat16 products are wrong, so that there it is float32."""
    if dtype == torch.bfloat16:
        return tl.float32 if is_interpreted() else tl.bfloat16
    return tl.float16 if dtype == torch.float16 else tl.float32


def split_workspace(
    grid: tuple[int, int, int], tile_size: int, out: Tensor, counters: SplitCounters
) -> tuple[Tensor, Tensor]:
    """Memory for partial sums and their counters; any tensor at all where there is one split, which needs neither."""
    if grid[2] == 1:
        return out, out
    num_tiles = grid[0] * grid[1]
    partial = torch.empty(num_tiles * grid[2] * tile_size, dtype=torch.float32, device=out.device)
    return partial, counters.of(num_tiles)
