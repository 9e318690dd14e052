"""Flat GEMM with integer weights: read once, unpacked in registers, multiplied on the tensor cores.

Each group of 32 columns is a product of its own, of x with exact integers, whose sums are then scaled: 8 rows of x take
8 multiplications for 32 weights where scaling the weights would take 32, and scaled weights are not rounded.
"""

import triton
import triton.language as tl
from torch import Tensor

from headrace.kernels.triton.flat_gemm import MAX_BLOCK_ROWS, block_rows, dot_dtype, split_workspace
from headrace.kernels.triton.launch import is_ptx
from headrace.kernels.triton.limits import DeviceLimits
from headrace.kernels.triton.nibbles import half, unpack
from headrace.kernels.triton.split_k import SplitCounters, finish
from headrace.kernels.triton.tiles import pipeline_stages
from headrace.kernels.tuning import Tiles
from headrace.kernels.weights import BLOCK_COLUMNS, BlockedWeight

_FEW_ROWS = 16


@triton.jit(do_not_specialize=["num_rows"])
def blocked_flat_gemm_kernel(
    x_ptr,
    values_ptr,
    scale_pairs_ptr,
    row_scales_ptr,
    bias_ptr,
    out_ptr,
    partial_ptr,
    num_arrived_ptr,
    num_rows,
    N,
    K,
    blocks_per_split,
    x_row_stride,
    values_block_stride,
    scales_block_stride,
    IS_INT4: tl.constexpr,
    IS_PTX: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCKS: tl.constexpr,
    IS_WHOLE: tl.constexpr,
    NUM_STAGES: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
):
    """out[m, n] = row_scales[n] * sum over groups g of scales[g, n] * (x[m, g] . q[n, g]), + bias[n].

    IS_PTX: compiled for an NVIDIA GPU. IS_WHOLE: K is so many whole steps, which spares tests (int4, 8 rows, sm_90:
    2.8 instructions a weight instead of 3.3).
    Grid: (blocks of N, blocks of M, splits of K). A step takes BLOCKS blocks of 64 columns. Both scales of a block are
    one word, so that they too come through the pipeline (cp.async takes 4 bytes at least).
    A warp has rows of W to itself, two warps a program: more would be given wgmma on sm_90, before each of which x goes
    through registers to shared memory behind a fence and a barrier (4.5 instructions a weight instead of 2.8).
    """
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    x_ptrs = x_ptr + m.to(tl.int64)[None, :] * x_row_stride
    first = tl.program_id(2) * blocks_per_split
    num_blocks = (K + 63) // 64
    end = tl.minimum(first + blocks_per_split, num_blocks)
    out = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for start in tl.range(first, end, BLOCKS, num_stages=NUM_STAGES):
        for i in tl.static_range(BLOCKS):
            # Blocks past the last one are another matrix's memory.
            b = start + i
            has_row = n < (N if IS_WHOLE else tl.where(b < num_blocks, N, 0))
            values_ptrs = values_ptr + b.to(tl.int64) * values_block_stride
            pair_ptrs = scale_pairs_ptr + b.to(tl.int64) * scales_block_stride + n
            pair = tl.load(pair_ptrs, mask=has_row, other=0)
            if IS_INT4:
                word_ptrs = values_ptrs + n[:, None] * 16 + tl.arange(0, 16)[None, :]
                pieces = unpack(tl.load(word_ptrs, mask=has_row[:, None], other=0), DOT_DTYPE, IS_PTX)
            for group in tl.static_range(2):
                scale = half(pair, group)
                k = b * 64 + group * 32
                if IS_INT4:
                    k_of_piece = tl.arange(0, 16)[:, None]
                    x = _columns(x_ptrs, m, num_rows, k + k_of_piece, K, IS_WHOLE)
                    sums = tl.dot(pieces[2 * group], x.to(DOT_DTYPE), input_precision="ieee")
                    x = _columns(x_ptrs, m, num_rows, k + 16 + k_of_piece, K, IS_WHOLE)
                    sums = tl.dot(pieces[2 * group + 1], x.to(DOT_DTYPE), sums, input_precision="ieee")
                else:
                    q_ptrs = values_ptrs + n[:, None] * 64 + group * 32 + tl.arange(0, 32)[None, :]
                    q = tl.load(q_ptrs, mask=has_row[:, None], other=0)
                    x = _columns(x_ptrs, m, num_rows, k + tl.arange(0, 32)[:, None], K, IS_WHOLE)
                    sums = tl.dot(q.to(DOT_DTYPE), x.to(DOT_DTYPE), input_precision="ieee")
                out += sums * scale[:, None]
    out *= tl.load(row_scales_ptr + n, mask=n < N, other=0.0)[:, None]
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


@triton.jit
def _columns(x_ptrs, m, num_rows, k, K, IS_WHOLE: tl.constexpr):
    is_row = m[None, :] < num_rows
    return tl.load(x_ptrs + k, mask=is_row if IS_WHOLE else is_row & (k < K), other=0.0)


def launch_blocked_flat_gemm(
    x: Tensor,
    weight: BlockedWeight,
    bias: Tensor | None,
    out: Tensor,
    tiles: Tiles,
    counters: SplitCounters,
    limits: DeviceLimits,
) -> None:
    """
    Shapes: x [M, K], weight [N, K], bias [N], out [M, N] contiguous; neighbouring columns of x lie together.
    """
    (num_rows, num_outputs), num_blocks = out.shape, weight.values.shape[0]
    block_m = block_rows(num_rows, limits)
    # More rows of x take more of shared memory, and their sums more registers: 194 for 64 rows of x and 32 of W.
    blocks = max(1, tiles.block_k // BLOCK_COLUMNS // (1 if block_m <= _FEW_ROWS else 2))
    # Without columns there are no blocks, and sums are zero all the same.
    blocks = max(1, min(blocks, triton.next_power_of_2(num_blocks)))
    block_n = tiles.block_n if block_m < MAX_BLOCK_ROWS else min(32, tiles.block_n)
    blocks_per_split = triton.cdiv(triton.cdiv(num_blocks, tiles.num_splits), blocks) * blocks
    grid = (triton.cdiv(num_outputs, block_n), triton.cdiv(num_rows, block_m), tiles.num_splits)
    partial, num_arrived = split_workspace(grid, block_m * block_n, out, counters)
    block_bytes = weight.values.element_size() * weight.values.shape[2] + 4
    stage_bytes = blocks * (block_n * block_bytes + block_m * BLOCK_COLUMNS * x.element_size())
    blocked_flat_gemm_kernel[grid](
        x,
        weight.values,
        weight.scale_pairs,
        weight.row_scales,
        x if bias is None else bias,
        out,
        partial,
        num_arrived,
        num_rows,
        num_outputs,
        weight.in_features,
        blocks_per_split,
        x.stride(0),
        weight.values.stride(0),
        weight.scale_pairs.stride(0),
        IS_INT4=weight.is_int4,
        IS_PTX=is_ptx(),
        HAS_BIAS=bias is not None,
        NUM_SPLITS=tiles.num_splits,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BLOCKS=blocks,
        IS_WHOLE=weight.in_features % (blocks * BLOCK_COLUMNS) == 0,
        NUM_STAGES=pipeline_stages(tiles, stage_bytes, limits),
        DOT_DTYPE=dot_dtype(x.dtype),
        num_warps=tiles.num_warps,
    )
