"""How the launches of a mixture of experts cut their work up: sound defaults, and what else to try."""

import math
from collections.abc import Iterator

from headrace.kernels.mixture_tuning import ExpertLaunch, ExpertMatrix, MixtureShape
from headrace.kernels.triton.limits import DeviceLimits
from headrace.kernels.tuning import Tiles

MOST_PAIRS = {16: 8, 32: 32, 64: 128, 128: math.inf}
"""Rows of a block by the most pairs of a token and an expert that an expert may have on average."""

_FEW_ROWS = 32

_FEW = {
    ExpertMatrix.UP: ((64, 4, 4), (32, 4, 8), (64, 4, 6), (128, 4, 4), (128, 8, 4)),
    ExpertMatrix.DOWN: ((32, 4, 8), (64, 4, 4), (64, 4, 6), (128, 4, 4), (128, 8, 4)),
}
_MANY = {
    64: ((128, 4, 3), (64, 4, 4), (128, 8, 3), (256, 8, 3)),
    128: ((128, 8, 3), (64, 4, 4), (128, 4, 3), (256, 8, 3)),
}
"""Rows of W that a block takes, of gate and up together; warps; stages. The default first.

One token of Mixtral's on 132 multiprocessors: two experts' ups of 14,336 rows each are 896 programs, of which 7 run at
once on each with 24 KiB of weights in flight, so all of them; two downs of 4,096 rows would be 128 such programs with
24 KiB on each, little more than latency times bandwidth (20 KiB), and are 256 of 28 KiB.
"""

_RESERVED_BYTES = 1024


def block_rows(num_pairs: int, num_experts: int) -> int:
    """Few tokens for each expert: narrow blocks; many: wide ones that reuse the weights."""
    return next(rows for rows, most in MOST_PAIRS.items() if num_pairs <= most * num_experts)


def expert_tile_choices(shape: MixtureShape, launch: ExpertLaunch, limits: DeviceLimits) -> list[Tiles]:
    """The default first, then its neighbours, of those that fit into shared memory.

    K is taken in steps of one length whatever the tokens, so that a row's sum does not depend on how many there are.
    """
    return list(dict.fromkeys(_choices(shape, launch, limits)))


def _choices(shape: MixtureShape, launch: ExpertLaunch, limits: DeviceLimits) -> Iterator[Tiles]:
    block_k = 32 if shape.activation_bytes == 4 else 64
    num_matrices = 2 if launch.matrix is ExpertMatrix.UP else 1
    for width, num_warps, asked_stages in (
        _FEW[launch.matrix] if launch.block_rows <= _FEW_ROWS else _MANY[launch.block_rows]
    ):
        # AMD's GPUs have 64 KiB for all programs, and two stages need one buffer there.
        num_stages = asked_stages if limits.lanes == 32 else 2
        num_buffers = num_stages if limits.lanes == 32 else 1
        stage_bytes = (width + launch.block_rows) * block_k * shape.activation_bytes
        if num_buffers * stage_bytes <= limits.program_shared_bytes - _RESERVED_BYTES:
            yield Tiles(block_n=width // num_matrices, block_k=block_k, num_warps=num_warps, num_stages=num_stages)
