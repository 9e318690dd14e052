"""GEMV on a GPU: each program multiplies some rows of a dense W with a few rows of x, on the CUDA cores.

Source: FlashDecoding++ (arXiv:2311.01282), section 5, ImplA, after FastGEMV.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from headrace.kernels.tuning import Tiles

VECTOR_BYTES = 16
"""What a lane loads at once."""

MAX_BLOCK_ROWS = 4
"""Rows of x that meet a row of W while it lies in registers; more rows read W again, from the L2 cache at best."""


@triton.jit(do_not_specialize=["num_rows"])
def gemv_kernel(
    x_ptr,
    w_ptr,
    bias_ptr,
    out_ptr,
    num_rows,
    N,
    K,
    x_row_stride,
    w_row_stride,
    HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    VECTOR: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    """out[m, n] = sum over k of x[m, k] * w[n, k], + bias[n].

    Grid: (blocks of N, blocks of M). BLOCK_K is what all lanes of a program load at once, 16 bytes each, so that a lane
    adds up VECTOR neighbouring products by itself, one sum for each row of W and of x, and lanes meet once at the end.
    Bytes in flight: BLOCK_N loads of 16 bytes in each lane. With BLOCK_N = 8, 4 warps and 42 registers (bfloat16, one
    row, sm_90) 10 programs of 16 KiB fit on a multiprocessor, where latency times bandwidth asks for about 20 KiB.
    Traffic: W once for each block of M, x from the caches.
    """
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None, None]
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :, None]
    k_of_tile = tl.arange(0, BLOCK_K)[None, None, :]
    x_ptrs = x_ptr + m.to(tl.int64) * x_row_stride
    w_ptrs = w_ptr + n.to(tl.int64) * w_row_stride
    sums = tl.zeros((BLOCK_M, BLOCK_N, BLOCK_K // VECTOR), tl.float32)
    for start in tl.range(0, K, BLOCK_K, num_stages=NUM_STAGES):
        k = start + k_of_tile
        w = tl.load(w_ptrs + k, mask=(n < N) & (k < K), other=0.0).to(tl.float32)
        x = tl.load(x_ptrs + k, mask=(m < num_rows) & (k < K), other=0.0).to(tl.float32)
        products = tl.reshape(x * w, (BLOCK_M, BLOCK_N, BLOCK_K // VECTOR, VECTOR))
        sums += tl.sum(products, axis=3)
    out = tl.sum(sums, axis=2)
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    if HAS_BIAS:
        out += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)
    tl.store(out_ptr + m.to(tl.int64) * N + n, out, mask=(m < num_rows) & (n < N))


def launch_gemv(x: Tensor, w: Tensor, bias: Tensor | None, out: Tensor, tiles: Tiles) -> None:
    """
    Shapes: x [M, K], w [N, K], bias [N], out [M, N] contiguous; neighbouring columns of x and w lie together.
    """
    num_rows, num_outputs = out.shape
    block_m = min(MAX_BLOCK_ROWS, triton.next_power_of_2(num_rows))
    grid = (triton.cdiv(num_outputs, tiles.block_n), triton.cdiv(num_rows, block_m))
    gemv_kernel[grid](
        x,
        w,
        x if bias is None else bias,
        out,
        num_rows,
        num_outputs,
        w.shape[1],
        x.stride(0),
        w.stride(0),
        HAS_BIAS=bias is not None,
        BLOCK_M=block_m,
        BLOCK_N=tiles.block_n,
        BLOCK_K=tiles.block_k,
        VECTOR=vector_length(w.dtype),
        NUM_STAGES=tiles.num_stages,
        num_warps=tiles.num_warps,
    )


def vector_length(dtype: torch.dtype) -> int:
    return VECTOR_BYTES // dtype.itemsize
