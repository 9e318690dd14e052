"""Mixtures of Mixtral-8x7B's sizes: a few tokens, and many."""

from collections.abc import Mapping

import triton.language as tl

from headrace.kernels.triton.mixture import experts_down_kernel, experts_up_kernel, weighted_sum_kernel
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
_DIVISIBLE = ("x_row_stride", "num_outputs", "num_inputs", "size")


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


def _constants(tokens: int, rows: int, num_bits: int, num_stages: int) -> dict[str, object]:
    return {
        "DTYPE": tl.bfloat16,
        "DOT_DTYPE": tl.bfloat16,
        "NUM_BITS": num_bits,
        "IS_ALIGNED": True,
        "GROUP": 32,
        "BLOCK_EXPERTS": 8,
        "BLOCK_M": tokens,
        "BLOCK_N": rows,
        "BLOCK_K": 64,
        "NUM_STAGES": num_stages,
    }


def _up(name: str, num_warps: int, *constants: int) -> Variant:
    return _variant(name, experts_up_kernel, num_warps, NUM_EXPERTS_PER_TOKEN=2, KIND="silu", **_constants(*constants))


def _down(name: str, num_warps: int, *constants: int) -> Variant:
    return _variant(name, experts_down_kernel, num_warps, out="*fp32", **_constants(*constants))


VARIANTS = [
    _variant("route", route_kernel, num_warps=1, K=2, RENORMALIZE=True, BLOCK=8),
    _variant("group", group_kernel, BLOCK=1024),
    _variant("weighted-sum", weighted_sum_kernel, types={"x_ptr": "*fp32"}, NUM_PARTS=2, BLOCK=1024),
    _up("up-of-few", 4, 16, 32, 0, 4),
    _up("up-of-many", 8, 128, 64, 0, 3),
    _down("down-of-many-int8", 8, 128, 128, 8, 3),
    _down("down-of-few-int4", 4, 16, 64, 4, 4),
]
