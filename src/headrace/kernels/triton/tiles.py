"""How the implementations of a linear layer cut their work up: sound defaults from a GPU's sizes, and what else to try.

Reading W decides the time of both, so tiles are chosen for bytes in flight: about 32 KiB for each multiprocessor is
what latency times bandwidth asks for on an H100 (0.8 us * 3.35 TB/s / 132 = 20 KiB, and as much again because a tile is
waited for as a whole).
"""

from collections.abc import Iterator
from dataclasses import replace
from math import ceil

from headrace.config import WeightFormat
from headrace.kernels.triton.limits import DeviceLimits
from headrace.kernels.tuning import Inflections, LinearArm, LinearShape, Tiles

_ITEM_BYTES = {WeightFormat.FLOAT32: 4, WeightFormat.BFLOAT16: 2}
_USUAL_BLOCK_ROWS = 16
_MAX_PROGRAMS = 3
"""Of a multiprocessor, that run together: with more, each has too few tiles in its pipeline."""

_MAX_SPLITS = 16
_MIN_SPLIT_COLUMNS = 512
_RESERVED_BYTES = 1024
"""Of shared memory, by the system, for each program."""


def default_inflections(shape: LinearShape) -> Inflections:
    """Before anything was measured.

    Dense: cuBLAS fills its tiles of 64 rows from there on. Integers: dequantizing first moves 4.5 bytes for each weight
    (read 0.5, write 2, read 2) instead of 0.5, which pays once products, at half of the rate of cuBLAS, take longer.
    Unpacking costs CUDA cores as much as multiplying one row, which tensor cores do beside it, so that int4 starts with
    flat GEMM. float32 has no tensor cores: GEMM is cuBLAS from the first row that GEMV does not take.
    """
    match shape.weight_format:
        case WeightFormat.FLOAT32:
            return Inflections(flat_gemm_from=5, gemm_from=5)
        case WeightFormat.BFLOAT16:
            return Inflections(flat_gemm_from=2, gemm_from=65)
        case WeightFormat.INT8:
            return Inflections(flat_gemm_from=2, gemm_from=257)
        case WeightFormat.INT4:
            return Inflections(flat_gemm_from=1, gemm_from=257)


def tile_choices(shape: LinearShape, arm: LinearArm, limits: DeviceLimits) -> list[Tiles]:
    """The default first, then its neighbours; none where the library decides."""
    if arm is LinearArm.GEMM:
        return []
    choices = _gemv_choices if arm is LinearArm.GEMV else _flat_gemm_choices
    return list(dict.fromkeys(choices(shape, limits)))


def pipeline_stages(tiles: Tiles, stage_bytes: int, limits: DeviceLimits) -> int:
    """As many of the stages asked for as fit into one program's shared memory."""
    return max(1, min(tiles.num_stages, (limits.program_shared_bytes - _RESERVED_BYTES) // stage_bytes))


def _gemv_choices(shape: LinearShape, limits: DeviceLimits) -> Iterator[Tiles]:
    default = _default_gemv(shape, limits)
    yield default
    for num_warps, block_n in ((4, 4), (4, 8), (4, 16), (8, 4), (8, 8), (2, 8)):
        yield _gemv(shape, limits, block_n=block_n, num_warps=num_warps)
    yield replace(default, num_stages=3)


def _default_gemv(shape: LinearShape, limits: DeviceLimits) -> Tiles:
    """Eight rows for each program, fewer where multiprocessors would be left without."""
    block_n = 8
    while block_n > 1 and ceil(shape.out_features / block_n) < 2 * limits.num_multiprocessors:
        block_n //= 2
    return _gemv(shape, limits, block_n=block_n, num_warps=4)


def _gemv(shape: LinearShape, limits: DeviceLimits, *, block_n: int, num_warps: int) -> Tiles:
    vector = 16 // _ITEM_BYTES[shape.weight_format]
    return Tiles(block_n=block_n, block_k=vector * limits.lanes * num_warps, num_warps=num_warps)


def _flat_gemm_choices(shape: LinearShape, limits: DeviceLimits) -> Iterator[Tiles]:
    default = _default_flat_gemm(shape, limits)
    yield default
    for block_n, block_k in ((16, 256), (32, 256), (64, 128), (128, 64), (128, 128)):
        yield _flat_gemm(shape, limits, block_n=block_n, block_k=block_k)
    for num_splits in (2, 4):
        yield _flat_gemm(shape, limits, block_n=64, block_k=128, num_splits=num_splits)
    yield replace(default, num_stages=default.num_stages + 2)
    yield replace(default, num_warps=8)


def _default_flat_gemm(shape: LinearShape, limits: DeviceLimits) -> Tiles:
    """The narrowest blocks of N that all run at once, since the last ones of a second wave would run alone; 64 where
    there are many waves. K is split where N is too small for all multiprocessors.

    On 132 multiprocessors [4096, 4096] is 128 programs of 32 rows, [12288, 4096] 384 of 32, [22016, 4096] 344 of 64,
    [32000, 4096] 250 of 128.
    """
    for block_n, block_k in ((32, 256), (64, 128), (128, 128)):
        num_programs = ceil(shape.out_features / block_n)
        if num_programs <= _MAX_PROGRAMS * limits.num_multiprocessors:
            num_splits = _default_splits(shape, num_programs, limits)
            return _flat_gemm(shape, limits, block_n=block_n, block_k=block_k, num_splits=num_splits)
    return _flat_gemm(shape, limits, block_n=64, block_k=128)


def _default_splits(shape: LinearShape, num_programs: int, limits: DeviceLimits) -> int:
    """Twice as many while there are too few programs for half of what runs at once."""
    num_splits = 1
    while (
        2 * num_splits * num_programs <= 1.5 * limits.num_multiprocessors
        and shape.in_features >= 2 * num_splits * _MIN_SPLIT_COLUMNS
        and num_splits < _MAX_SPLITS
    ):
        num_splits *= 2
    return num_splits


def _flat_gemm(shape: LinearShape, limits: DeviceLimits, *, block_n: int, block_k: int, num_splits: int = 1) -> Tiles:
    """With a pipeline as deep as shared memory allows for the programs that are to run together."""
    num_programs = ceil(shape.out_features / block_n) * num_splits
    together = min(_MAX_PROGRAMS, max(1, ceil(num_programs / limits.num_multiprocessors)))
    stage_bytes = (block_n + _USUAL_BLOCK_ROWS) * block_k * _ITEM_BYTES[shape.weight_format]
    room = min(limits.shared_bytes // together - _RESERVED_BYTES, limits.program_shared_bytes)
    # Below 64 rows tensor cores read registers, which saves the pipeline one buffer.
    num_stages = max(2, room // stage_bytes) + (1 if block_n < 64 else 0)
    return Tiles(block_n=block_n, block_k=block_k, num_splits=num_splits, num_stages=min(6, num_stages))
