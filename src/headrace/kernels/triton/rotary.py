"""Angles of rotary position embedding, as a table of cosines and sines."""

import torch
import triton
import triton.language as tl
from torch import Tensor


def rotary_table(positions: Tensor, inv_freq: Tensor, amplitude: float) -> tuple[Tensor, Tensor]:
    """amplitude * cos and sin of position * inv_freq, the product rounded to float32.

    Shapes:
        positions: [num_tokens] int64
        inv_freq:  [half] float32
        returns:   two tensors [num_tokens, half] float32
    """
    half = len(inv_freq)
    cos, sin = torch.empty(2, len(positions), half, dtype=torch.float32, device=positions.device)
    if len(positions):
        rotary_table_kernel[(len(positions),)](
            positions.contiguous(),
            inv_freq.contiguous(),
            amplitude,
            cos,
            sin,
            HALF=half,
            BLOCK_HALF=triton.next_power_of_2(half),
            num_warps=1,
        )
    return cos, sin


@triton.jit(do_not_specialize_on_alignment=("positions_ptr",))
def rotary_table_kernel(
    positions_ptr, inv_freq_ptr, amplitude, cos_ptr, sin_ptr, HALF: tl.constexpr, BLOCK_HALF: tl.constexpr
):
    token = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK_HALF)
    position = tl.load(positions_ptr + token).to(tl.float32)
    angles = position * tl.load(inv_freq_ptr + i, mask=i < HALF, other=0.0)
    tl.store(cos_ptr + token * HALF + i, tl.cos(angles) * amplitude, mask=i < HALF)
    tl.store(sin_ptr + token * HALF + i, tl.sin(angles) * amplitude, mask=i < HALF)
