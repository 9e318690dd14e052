"""The kernel that measures what a GPU can read."""

from headrace.kernels.triton.machine_ops import _BLOCK, _BLOCKS_PER_PROGRAM, _NUM_WARPS, _scan_kernel
from triton_variants import Variant

VARIANTS = [
    Variant(
        name="scan",
        kernel=_scan_kernel,
        signature={"buffer_ptr": "*fp32", "out_ptr": "*fp32", "n": "i32"},
        constexprs={"BLOCK": _BLOCK, "BLOCKS_PER_PROGRAM": _BLOCKS_PER_PROGRAM},
        num_warps=_NUM_WARPS,
        divisible=("n",),
    )
]
