"""Norms and activations of Llama-2-7B's sizes, of heads, and of sizes that are no powers of two."""

from headrace.kernels.triton.activation import activation_kernel, gated_activation_kernel
from headrace.kernels.triton.norm import add_kernel, norm_kernel
from triton_variants import Variant

_NORM = dict.fromkeys(("x_ptr", "residual_ptr", "weight_ptr", "bias_ptr", "out_ptr"), "*bf16") | {
    "num_rows": "i32",
    "num_inner": "i32",
    "outer_stride": "i32",
    "inner_stride": "i32",
    "size": "i32",
    "eps": "fp32",
}


def _norm(
    name: str,
    rows: int,
    size: int,
    num_warps: int,
    *,
    layer: bool = False,
    residual: bool = False,
    ones: tuple[str, ...] = (),
) -> Variant:
    """ones: integers that are 1, for which Triton compiles anew."""
    return Variant(
        name=name,
        kernel=norm_kernel,
        signature={arg: kind for arg, kind in _NORM.items() if arg not in ones},
        constexprs=dict.fromkeys(ones, 1)
        | {
            "IS_LAYER_NORM": layer,
            "HAS_RESIDUAL": residual,
            "UNIT_OFFSET": False,
            "BLOCK_ROWS": rows,
            "BLOCK_SIZE": size,
        },
        num_warps=num_warps,
        divisible=("outer_stride", "inner_stride", "size"),
    )


VARIANTS = [
    _norm("rms-norm-of-hidden-states", 1, 4096, 16, residual=True, ones=("num_inner",)),
    _norm("rms-norm-of-heads", 8, 128, 4),
    _norm("layer-norm", 1, 16384, 16, layer=True, residual=True),
    Variant(
        name="add",
        kernel=add_kernel,
        signature={"residual_ptr": "*bf16", "x_ptr": "*bf16", "num_elements": "i32"},
        constexprs={"BLOCK": 1024},
        divisible=("num_elements",),
    ),
    Variant(
        name="gelu",
        kernel=activation_kernel,
        signature={"x_ptr": "*bf16", "out_ptr": "*bf16", "num_elements": "i32"},
        constexprs={"KIND": "gelu", "BLOCK": 1024},
        divisible=("num_elements",),
    ),
    *(
        Variant(
            name=f"gated-{kind}",
            kernel=gated_activation_kernel,
            signature={"x_ptr": "*bf16", "out_ptr": "*bf16", "row_stride": "i32", "size": "i32"},
            constexprs={"KIND": kind, "BLOCK": 1024},
            divisible=("row_stride", "size"),
        )
        for kind in ("silu", "gelu_tanh")
    ),
]
