"""GEMV with integer weights, unpacked in registers, on the CUDA cores."""

import triton
import triton.language as tl
from torch import Tensor

from headrace.kernels.triton.gemv import MAX_BLOCK_ROWS
from headrace.kernels.tuning import Tiles
from headrace.kernels.weights import BlockedWeight

ITEMS = 8
"""Values that a lane takes at once: 8 words of four nibbles, or 8 bytes."""


@triton.jit(do_not_specialize=["num_rows"])
def blocked_gemv_kernel(
    x_ptr,
    values_ptr,
    scales_ptr,
    row_scales_ptr,
    bias_ptr,
    out_ptr,
    num_rows,
    N,
    K,
    x_row_stride,
    values_block_stride,
    scales_block_stride,
    IS_INT4: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    """out[m, n] = row_scales[n] * sum over groups g of scales[g, n] * (x[m, g] . q[n, g]), + bias[n].

    Grid: (blocks of N, blocks of M). A block of 64 columns is 2 (int4) or 8 (int8) chunks of 8 values; lanes have
    different chunks and the same BLOCK_N rows, so that each x is read once for all of them. x and W are both taken 8 at
    a time, so that they can have one layout.
    """
    CHUNKS: tl.constexpr = 2 if IS_INT4 else 8
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None, None, None]
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :, None]
    item = tl.arange(0, 8)[None, None, None, :]
    x_ptrs = x_ptr + m.to(tl.int64) * x_row_stride
    num_chunks = (K + 63) // 64 * CHUNKS
    sums = tl.zeros((BLOCK_M, BLOCK_N, BLOCK_C), tl.float32)
    for start in tl.range(0, num_chunks, BLOCK_C, num_stages=NUM_STAGES):
        chunk = start + tl.arange(0, BLOCK_C)[None, None, :]
        b, part = chunk // CHUNKS, chunk % CHUNKS
        has_row = (n < N) & (chunk < num_chunks)
        places = b.to(tl.int64) * values_block_stride + (n * CHUNKS + part) * 8
        q = tl.load(values_ptr + places[:, :, :, None] + item, mask=has_row[:, :, :, None], other=0)
        scale_ptrs = scales_ptr + b.to(tl.int64) * scales_block_stride + n * 2
        k = (b * 64 + part * 8)[:, :, :, None] + item
        if IS_INT4:
            q = q.to(tl.int32)
            for group in tl.static_range(2):
                products = _nibbles(q, 2 * group) * _columns(x_ptrs, m, num_rows, k + 32 * group, K)
                products += _nibbles(q, 2 * group + 1) * _columns(x_ptrs, m, num_rows, k + 32 * group + 16, K)
                scale = tl.load(scale_ptrs + group, mask=has_row, other=0.0).to(tl.float32)
                sums += scale * tl.sum(products, axis=3)
        else:
            products = q.to(tl.float32) * _columns(x_ptrs, m, num_rows, k, K)
            scale = tl.load(scale_ptrs + part // 4, mask=has_row, other=0.0).to(tl.float32)
            sums += scale * tl.sum(products, axis=3)
    out = tl.sum(sums, axis=2)
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    out *= tl.load(row_scales_ptr + n, mask=n < N, other=0.0)
    if HAS_BIAS:
        out += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)
    tl.store(out_ptr + m.to(tl.int64) * N + n, out, mask=(m < num_rows) & (n < N))


@triton.jit
def _columns(x_ptrs, m, num_rows, k, K):
    return tl.load(x_ptrs + k, mask=(m < num_rows) & (k < K), other=0.0).to(tl.float32)


@triton.jit
def _nibbles(words, INDEX: tl.constexpr):
    """q as float32: with the exponent in which bit 4 INDEX of the mantissa counts 1, no shift is needed."""
    bits = (words & (15 << (4 * INDEX))) | ((150 - 4 * INDEX) << 23)
    return bits.to(tl.float32, bitcast=True) - ((1 << (23 - 4 * INDEX)) + 8.0)


def launch_blocked_gemv(x: Tensor, weight: BlockedWeight, bias: Tensor | None, out: Tensor, tiles: Tiles) -> None:
    """
    Shapes: x [M, K], weight [N, K], bias [N], out [M, N] contiguous; neighbouring columns of x lie together.
    """
    num_rows, num_outputs = out.shape
    block_m = min(MAX_BLOCK_ROWS, triton.next_power_of_2(num_rows))
    grid = (triton.cdiv(num_outputs, tiles.block_n), triton.cdiv(num_rows, block_m))
    blocked_gemv_kernel[grid](
        x,
        weight.values,
        weight.scales,
        weight.row_scales,
        x if bias is None else bias,
        out,
        num_rows,
        num_outputs,
        weight.in_features,
        x.stride(0),
        weight.values.stride(0),
        weight.scales.stride(0),
        IS_INT4=weight.is_int4,
        HAS_BIAS=bias is not None,
        BLOCK_M=block_m,
        BLOCK_N=tiles.block_n,
        BLOCK_C=tiles.block_k // (ITEMS * weight.values_per_item),
        NUM_STAGES=tiles.num_stages,
        num_warps=tiles.num_warps,
    )
