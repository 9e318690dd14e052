"""How the launches of a mixture of experts cut their work up: sound defaults, and what else to try."""

import math
from collections.abc import Iterator

from headrace.config import WeightFormat
from headrace.kernels.mixture_tuning import ExpertLaunch, ExpertMatrix, MixtureShape
from headrace.kernels.triton.limits import DeviceLimits
from headrace.kernels.tuning import Tiles

MOST_PAIRS = {16: 8, 32: 32, 64: 128, 128: math.inf}
"""Rows of a block by the most pairs of a token and an expert that an expert may have on average."""

_FEWEST_ROWS = 16

_FEW = ((64, 4, 4), (32, 4, 8), (64, 4, 6), (128, 4, 4), (128, 8, 4))
_FEW_QUANTIZED = ((64, 2, 3), (128, 2, 3), (32, 2, 4), (128, 4, 3))

_DENSE = {
    16: _FEW,
    32: _FEW,
    64: ((128, 4, 3), (64, 4, 4), (128, 8, 3), (256, 8, 3)),
    128: ((128, 8, 3), (64, 4, 4), (128, 4, 3), (256, 8, 3)),
}
"""By rows of a block, forms of launches: rows of W that it takes, of gate and up together; warps; stages. The default
first.

One token of Mixtral's on 132 multiprocessors: two experts' ups of 14,336 rows each are 896 programs, of which 7 run at
once on each with 24 KiB of weights in flight. Two downs of 4,096 rows would be 128 such programs, with 24 KiB on each
where latency times bandwidth asks for 20; K in 4 splits makes 512 of them.
"""

_QUANTIZED = {
    16: _FEW_QUANTIZED,
    32: _FEW_QUANTIZED,
    64: ((128, 4, 3), (64, 4, 4), (128, 8, 3), (256, 8, 3)),
    128: ((128, 4, 3), (128, 8, 3), (256, 8, 3), (64, 4, 4)),
}
"""For few rows two warps, for the reason that `blocked_flat_gemm` has: 3.9 instructions a weight (int4, up, 16 rows,
sm_90). For many each matrix has 64 rows for every four warps, as warps that share rows of W unpack all of them: 8
instead of 22.
"""

_STEP_COLUMNS = {WeightFormat.INT8: 128, WeightFormat.INT4: 256}
"""Quantized ones of a step with 16 rows: with more, x and the sums take more of what there is."""

_MAX_SPLITS, _MIN_SPLIT_COLUMNS = 4, 1024
_WEIGHT_BITS = {WeightFormat.FLOAT32: 32, WeightFormat.BFLOAT16: 16, WeightFormat.INT8: 8, WeightFormat.INT4: 4}
_RESERVED_BYTES = 1024


def block_rows(num_pairs: int, num_experts: int) -> int:
    """Few tokens for each expert: narrow blocks; many: wide ones that reuse the weights."""
    return next(rows for rows, most in MOST_PAIRS.items() if num_pairs <= most * num_experts)


def expert_tile_choices(shape: MixtureShape, launch: ExpertLaunch, limits: DeviceLimits) -> list[Tiles]:
    """The default first, then its neighbours, of those that fit into shared memory.

    What is added up at once is the same for all: 64 columns, or 32 of float32 or quantized ones.
    """
    choices = dict.fromkeys(_choices(shape, launch, limits))
    return [tiles for tiles in choices if _fits(tiles, shape, launch, limits)]


def _choices(shape: MixtureShape, launch: ExpertLaunch, limits: DeviceLimits) -> Iterator[Tiles]:
    forms = _QUANTIZED if shape.weight_format in _STEP_COLUMNS else _DENSE
    num_matrices = 2 if launch.matrix is ExpertMatrix.UP else 1
    for width, num_warps, num_stages in forms[launch.block_rows]:
        yield Tiles(
            block_n=width // num_matrices,
            block_k=_block_k(shape, launch),
            num_splits=_num_splits(shape, launch),
            num_warps=num_warps,
            num_stages=num_stages if limits.lanes == 32 else 2,
        )


def _block_k(shape: MixtureShape, launch: ExpertLaunch) -> int:
    if shape.weight_format not in _STEP_COLUMNS:
        return 128 // shape.activation_bytes
    return max(64, _STEP_COLUMNS[shape.weight_format] * _FEWEST_ROWS // launch.block_rows)


def _num_splits(shape: MixtureShape, launch: ExpertLaunch) -> int:
    """Of K, for the downs of few tokens."""
    num_splits = 1
    if launch.matrix is ExpertMatrix.DOWN and launch.block_rows == _FEWEST_ROWS:
        while num_splits < _MAX_SPLITS and shape.intermediate_size >= 2 * num_splits * _MIN_SPLIT_COLUMNS:
            num_splits *= 2
    return num_splits


def _fits(tiles: Tiles, shape: MixtureShape, launch: ExpertLaunch, limits: DeviceLimits) -> bool:
    """On AMD's GPUs, which have 64 KiB for all programs, two stages need one buffer."""
    num_matrices = 2 if launch.matrix is ExpertMatrix.UP else 1
    row_bits = tiles.block_n * num_matrices * _WEIGHT_BITS[shape.weight_format]
    column_bytes = row_bits // 8 + launch.block_rows * shape.activation_bytes
    num_buffers = tiles.num_stages if limits.lanes == 32 else 1
    return num_buffers * column_bytes * tiles.block_k <= limits.program_shared_bytes - _RESERVED_BYTES
