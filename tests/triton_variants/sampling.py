"""Rows of a vocabulary of 128,256."""

from headrace.kernels.triton.sampling import (
    argmax_kernel,
    log_sum_exp_kernel,
    tile_argmax_kernel,
    tile_sum_kernel,
)
from headrace.kernels.triton.top_k import collect_kernel, count_above_kernel, count_digits_kernel, rank_kernel
from triton_variants import Variant

_TYPES = {
    "logits_ptr": "*fp32",
    "keys_ptr": "*i64",
    "ids_ptr": "*i64",
    "values_ptr": "*fp32",
    "largest_ptr": "*fp32",
    "sums_ptr": "*fp32",
    "counts_ptr": "*i32",
    "above_ptr": "*i32",
    "equal_ptr": "*i32",
    "selected_ptr": "*i64",
    "row_stride": "i32",
    "vocab_size": "i32",
    "num_tiles": "i32",
    "k": "i32",
}
_DIVISIBLE = ("row_stride", "vocab_size", "num_tiles")


def _variant(name, kernel, num_warps=8, out="*fp32", **constexprs) -> Variant:
    signature = {arg: (_TYPES | {"out_ptr": out})[arg] for arg in kernel.arg_names if arg not in constexprs}
    return Variant(
        name=name,
        kernel=kernel,
        signature=signature,
        constexprs=constexprs,
        num_warps=num_warps,
        divisible=tuple(arg for arg in _DIVISIBLE if arg in signature),
    )


VARIANTS = [
    _variant("argmax-of-tiles", tile_argmax_kernel, TILE=4096),
    _variant("argmax", argmax_kernel, num_warps=1, BLOCK=32),
    _variant("sums-of-tiles", tile_sum_kernel, TILE=4096),
    _variant("log-sum-exp", log_sum_exp_kernel, num_warps=1, BLOCK=32),
    _variant("first-digits", count_digits_kernel, DIGIT=0, TILE=4096),
    _variant("last-digits", count_digits_kernel, DIGIT=3, TILE=4096),
    _variant("count-above", count_above_kernel, TILE=4096),
    _variant("collect", collect_kernel, TILE=4096, BLOCK=32),
    _variant("rank", rank_kernel, num_warps=4, out="*i64", RANKED=32, BLOCK=256),
]
