"""Mixtures of Mixtral-8x7B's sizes: a few tokens, and many, as they are launched before anything was measured."""

from collections.abc import Mapping
from dataclasses import replace

import triton.language as tl

from headrace.config import WeightFormat
from headrace.kernels.mixture_tuning import ExpertLaunch, ExpertMatrix, MixtureShape
from headrace.kernels.triton.expert_tiles import expert_tile_choices
from headrace.kernels.triton.expert_weights import WeightKind
from headrace.kernels.triton.limits import H100
from headrace.kernels.triton.mixture_kernels import experts_down_kernel, experts_up_kernel, weighted_sum_kernel
from headrace.kernels.triton.routing import group_kernel, route_kernel
from triton_variants import Variant

_TYPES = {
    "x_ptr": "*bf16",
    "values_ptr": "*i64",
    "scales_ptr": "*i64",
    "row_scales_ptr": "*i64",
    "pairs_ptr": "*i32",
    "starts_ptr": "*i32",
    "experts_ptr": "*i32",
    "logits_ptr": "*bf16",
    "weights_ptr": "*fp32",
}
_DIVISIBLE = ("x_row_stride", "num_outputs", "num_inputs", "k_per_split", "size")


def _variant(name, kernel, num_warps=4, out="*bf16", types: Mapping[str, str] | None = None, **constexprs) -> Variant:
    kinds = _TYPES | {"out_ptr": out} | dict(types or {})
    signature = {arg: kinds.get(arg, "i32") for arg in kernel.arg_names if arg not in constexprs}
    return Variant(
        name=name,
        kernel=kernel,
        signature=signature,
        constexprs=constexprs,
        num_warps=num_warps,
        divisible=tuple(arg for arg in _DIVISIBLE if arg in signature),
    )


_AMD = replace(H100, program_shared_bytes=64 * 2**10, shared_bytes=64 * 2**10, lanes=64)
_BITS = {WeightFormat.BFLOAT16: 0, WeightFormat.INT8: 8, WeightFormat.INT4: 4}


def _experts(
    name: str, matrix: ExpertMatrix, rows: int, weight_format: WeightFormat, *, is_ptx: bool = True, most: float = 0.0
) -> Variant:
    """With the tiles that a launch takes by default."""
    shape = MixtureShape(
        weight_format=weight_format, activation_bytes=2, num_experts=8, hidden_size=4096, intermediate_size=14336
    )
    tiles = expert_tile_choices(shape, ExpertLaunch(matrix=matrix, block_rows=rows), H100 if is_ptx else _AMD)[0]
    is_up, num_bits = matrix is ExpertMatrix.UP, _BITS[weight_format]
    constants = {"NUM_EXPERTS_PER_TOKEN": 2, "KIND": "silu"} if is_up else {"NUM_SPLITS": tiles.num_splits}
    variant = _variant(
        name,
        experts_up_kernel if is_up else experts_down_kernel,
        tiles.num_warps,
        out="*bf16" if is_up else "*fp32",
        **constants,
        WEIGHT=WeightKind(dtype=tl.bfloat16, dot_dtype=tl.bfloat16, num_bits=num_bits, is_aligned=True, is_ptx=is_ptx),
        BLOCK_EXPERTS=8,
        BLOCK_M=rows,
        BLOCK_N=tiles.block_n,
        BLOCK_K=tiles.block_k,
        STEP=64 if num_bits else tiles.block_k,
        NUM_STAGES=tiles.num_stages,
    )
    return replace(
        variant,
        targets=("sm_90", "sm_80") if is_ptx else ("gfx942",),
        weights_per_round=tiles.block_n * (2 if is_up else 1) * tiles.block_k // (32 * tiles.num_warps),
        most_instructions=most,
    )


_UP, _DOWN = ExpertMatrix
_BF16, _INT8, _INT4 = WeightFormat.BFLOAT16, WeightFormat.INT8, WeightFormat.INT4

VARIANTS = [
    _variant("route", route_kernel, num_warps=1, K=2, RENORMALIZE=True, BLOCK=8),
    _variant("group", group_kernel, BLOCK=1024),
    _variant("weighted-sum", weighted_sum_kernel, types={"x_ptr": "*fp32"}, NUM_PARTS=2, NUM_SPLITS=4, BLOCK=1024),
    _experts("up-of-few", _UP, 16, _BF16),
    _experts("down-of-few-portable", _DOWN, 16, _BF16, is_ptx=False),
    _experts("up-of-few-int4", _UP, 16, _INT4, most=4.2),
    _experts("up-of-few-int4-portable", _UP, 16, _INT4, is_ptx=False),
    _experts("up-of-many", _UP, 128, _BF16),
    _experts("down-of-few-int8", _DOWN, 16, _INT8, most=5.0),
    _experts("up-of-many-int8", _UP, 128, _INT8, most=6.6),
    _experts("down-of-many-int8-portable", _DOWN, 128, _INT8, is_ptx=False),
    _experts("down-of-many-int4", _DOWN, 64, _INT4, most=7.6),
]
