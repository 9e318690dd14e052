"""Feed-forward activations."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from headrace.config import Activation
from headrace.errors import ShapeError
from headrace.kernels.triton.rows import warps_for

_BLOCK = 1024


@triton.jit
def activate(x, KIND: tl.constexpr):
    """act(x) of float32, elementwise; KIND is the value of an `Activation`."""
    if KIND == "silu":
        out = x / (1.0 + tl.exp(-x))
    elif KIND == "gelu":
        out = 0.5 * x * (1.0 + tl.math.erf(x * 0.7071067811865476))
    elif KIND == "gelu_tanh":
        # (1 + tanh(u)) / 2 = 1 / (1 + exp(-2u)), u = sqrt(2 / pi) * (x + 0.044715 x^3)
        out = x / (1.0 + tl.exp(-1.5957691216057308 * (x + 0.044715 * x * x * x)))
    else:
        tl.static_assert(KIND == "relu")
        out = tl.where(x <= 0.0, 0.0, x)  # NaN stays
    return out


@triton.jit
def activation_kernel(x_ptr, out_ptr, num_elements, KIND: tl.constexpr, BLOCK: tl.constexpr):
    """Grid: one program for BLOCK elements."""
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    is_inside = offsets < num_elements
    x = tl.load(x_ptr + offsets, mask=is_inside, other=0.0)
    out = activate(x.to(tl.float32), KIND)
    tl.store(out_ptr + offsets, out.to(out_ptr.dtype.element_ty), mask=is_inside)


@triton.jit
def gated_activation_kernel(x_ptr, out_ptr, row_stride, size, KIND: tl.constexpr, BLOCK: tl.constexpr):
    """Grid: [num_rows, ceil(size / BLOCK)]; out is contiguous."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_inside = columns < size
    gate = tl.load(x_ptr + row * row_stride + columns, mask=is_inside, other=0.0)
    up = tl.load(x_ptr + row * row_stride + size + columns, mask=is_inside, other=0.0)
    # Rounded before the product, as the definition does.
    activated = activate(gate.to(tl.float32), KIND).to(x_ptr.dtype.element_ty)
    out = activated.to(tl.float32) * up.to(tl.float32)
    tl.store(out_ptr + row * size + columns, out.to(out_ptr.dtype.element_ty), mask=is_inside)


def activation(x: Tensor, kind: Activation) -> Tensor:
    """`reference.activation`."""
    x = x.contiguous()
    out = torch.empty_like(x)
    if num_elements := x.numel():
        grid = (triton.cdiv(num_elements, _BLOCK),)
        activation_kernel[grid](x, out, num_elements, KIND=kind.value, BLOCK=_BLOCK, num_warps=warps_for(_BLOCK))
    return out


def gated_activation(x: Tensor, kind: Activation) -> Tensor:
    """`reference.gated_activation`.

    Raises:
        ShapeError: x is not [num_tokens, 2 * intermediate_size].
    """
    if x.dim() != 2 or x.shape[1] % 2:
        raise ShapeError(f"x is {list(x.shape)}; want [num_tokens, 2 * intermediate_size]")
    x = x if x.stride(1) == 1 else x.contiguous()
    size = x.shape[1] // 2
    out = torch.empty(len(x), size, dtype=x.dtype, device=x.device)
    if out.numel():
        block = min(_BLOCK, triton.next_power_of_2(size))
        gated_activation_kernel[(len(x), triton.cdiv(size, block))](
            x, out, x.stride(0), size, KIND=kind.value, BLOCK=block, num_warps=warps_for(block)
        )
    return out
