"""Linear layers as they are launched for 1 to 64 rows, and embeddings."""

from dataclasses import replace

from triton.language import bfloat16

from headrace.kernels.triton.blocked_flat_gemm import blocked_flat_gemm_kernel
from headrace.kernels.triton.blocked_gemv import blocked_gemv_kernel
from headrace.kernels.triton.flat_gemm import flat_gemm_kernel
from headrace.kernels.triton.gather import gather_blocked_kernel, gather_dense_kernel
from headrace.kernels.triton.gemv import gemv_kernel
from triton_variants import Variant

_INTEGERS = (
    "num_rows",
    "N",
    "K",
    "k_per_split",
    "blocks_per_split",
    "x_row_stride",
    "w_row_stride",
    "values_block_stride",
    "scales_block_stride",
    "offset",
)
_TYPES = dict.fromkeys(_INTEGERS, "i32") | {
    "x_ptr": "*bf16",
    "w_ptr": "*bf16",
    "bias_ptr": "*bf16",
    "out_ptr": "*bf16",
    "partial_ptr": "*fp32",
    "num_arrived_ptr": "*i32",
    "row_scales_ptr": "*fp32",
    "scale_pairs_ptr": "*i32",
    "scales_ptr": "*fp16",
    "ids_ptr": "*i64",
    "scale": "fp32",
    "outside": "fp32",
}
_DIVISIBLE = tuple(name for name in _INTEGERS if name not in ("num_rows", "blocks_per_split", "offset"))


def _variant(name, kernel, num_warps=4, *, values="*i16", **constexprs):
    types = _TYPES | {"values_ptr": values}
    signature = {argument: types[argument] for argument in kernel.arg_names if argument not in constexprs}
    divisible = tuple(argument for argument in _DIVISIBLE if argument in signature)
    return Variant(
        name=name,
        kernel=kernel,
        signature=signature,
        constexprs=constexprs,
        num_warps=num_warps,
        divisible=divisible,
    )


def _gemv(name, block_m):
    return _variant(name, gemv_kernel, HAS_BIAS=True, BLOCK_M=block_m, BLOCK_N=8, BLOCK_K=1024, VECTOR=8, NUM_STAGES=1)


def _flat_gemm(name, block_m, block_n, block_k, num_splits, num_stages):
    return _variant(
        name,
        flat_gemm_kernel,
        HAS_BIAS=True,
        NUM_SPLITS=num_splits,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BLOCK_K=block_k,
        NUM_STAGES=num_stages,
        DOT_DTYPE=bfloat16,
    )


def _blocked_gemv(name, is_int4, block_m):
    return _variant(
        name,
        blocked_gemv_kernel,
        values="*i16" if is_int4 else "*i8",
        IS_INT4=is_int4,
        HAS_BIAS=True,
        BLOCK_M=block_m,
        BLOCK_N=8,
        BLOCK_C=128,
        NUM_STAGES=1,
    )


def _blocked_flat_gemm(name, is_int4, block_m, block_n, blocks, num_splits=1, *, is_ptx=True, most=0.0):
    num_warps = 2
    variant = _variant(
        name,
        blocked_flat_gemm_kernel,
        num_warps,
        values="*i16" if is_int4 else "*i8",
        IS_INT4=is_int4,
        IS_PTX=is_ptx,
        HAS_BIAS=True,
        NUM_SPLITS=num_splits,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BLOCKS=blocks,
        IS_WHOLE=True,
        NUM_STAGES=3 if is_ptx else 2,
        DOT_DTYPE=bfloat16,
    )
    return replace(
        variant,
        targets=("sm_90", "sm_80") if is_ptx else ("gfx942",),
        weights_per_round=block_n * blocks * 64 // (32 * num_warps),
        most_instructions=most,
    )


VARIANTS = [
    _gemv("gemv of 1 row", 1),
    _flat_gemm("flat gemm of 8 rows, 32 wide", 8, 32, 256, 1, 3),
    _flat_gemm("flat gemm of 16 rows, 64 wide, split", 16, 64, 128, 4, 3),
    _flat_gemm("flat gemm of 64 rows", 64, 64, 128, 1, 2),
    _blocked_gemv("int4 gemv", True, 1),
    _blocked_gemv("int8 gemv of 2 rows", False, 2),
    _blocked_flat_gemm("int4 flat gemm of 8 rows", True, 8, 64, 4, most=2.8),
    _blocked_flat_gemm("int4 flat gemm of 16 rows, split", True, 16, 64, 4, 4, most=3.2),
    _blocked_flat_gemm("int4 flat gemm of 16 rows, portable", True, 16, 64, 4, is_ptx=False),
    _blocked_flat_gemm("int4 flat gemm of 64 rows", True, 64, 32, 2),
    _blocked_flat_gemm("int8 flat gemm of 8 rows", False, 8, 64, 2, most=3.9),
    _blocked_flat_gemm("int8 flat gemm of 16 rows, split, portable", False, 16, 64, 2, 4, is_ptx=False),
    _variant("embedding", gather_dense_kernel, BLOCK_K=1024),
    _variant("int4 embedding", gather_blocked_kernel, IS_INT4=True, HAS_IDS=True, BLOCK_K=1024),
    _variant("int8 rows", gather_blocked_kernel, values="*i8", IS_INT4=False, HAS_IDS=False, BLOCK_K=1024),
]
