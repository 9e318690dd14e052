"""How the implementations of a linear layer cut their work up: sound defaults from a GPU's sizes, and what else to try.

Reading W decides the time of both, so tiles are chosen for bytes in flight: about 32 KiB for each multiprocessor is
what latency times bandwidth asks for on an H100 (0.8 us * 3.35 TB/s / 132 = 20 KiB, and as much again because a tile is
waited for as a whole).
"""

from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from math import ceil

from headrace.config import WeightFormat
from headrace.kernels.triton.limits import DeviceLimits
from headrace.kernels.tuning import Inflections, LinearArm, LinearShape, Tiles

_ITEM_BYTES = {WeightFormat.FLOAT32: 4, WeightFormat.BFLOAT16: 2}
_GEMV_COLUMNS = {WeightFormat.FLOAT32: 4, WeightFormat.BFLOAT16: 8, WeightFormat.INT8: 8, WeightFormat.INT4: 32}
_USUAL_BLOCK_ROWS = 16
_MAX_PROGRAMS = 3
"""Of a multiprocessor, that run together: with more, each has too few tiles in its pipeline."""

_MAX_SPLITS = 16
_MIN_SPLIT_COLUMNS, _MIN_BLOCKED_SPLIT_COLUMNS = 512, 1024
_RESERVED_BYTES = 1024
"""Of shared memory, by the system, for each program."""


def default_inflections(shape: LinearShape) -> Inflections:
    """Before anything was measured.

    Dense: cuBLAS fills its tiles of 64 rows from there on. Integers: tensor cores from the first row on, because they
    leave the CUDA cores to unpack: 2.8 instructions for a weight of int4 in flat GEMM; in GEMV 5.2, or 6.2 as Triton
    3.6 compiles it, where an H100 has time for 4.8 at its bandwidth (counted on sm_90). Dequantizing first moves 4.5
    bytes for each weight (read 0.5, write 2, read 2) instead of 0.5, which pays once products, at half of the rate of
    cuBLAS, take longer. float32 has no tensor cores: GEMM is cuBLAS from the first row that GEMV does not take.
    """
    match shape.weight_format:
        case WeightFormat.FLOAT32:
            return Inflections(flat_gemm_from=5, gemm_from=5)
        case WeightFormat.BFLOAT16:
            return Inflections(flat_gemm_from=2, gemm_from=65)
        case WeightFormat.INT8 | WeightFormat.INT4:
            return Inflections(flat_gemm_from=1, gemm_from=257)


def tile_choices(shape: LinearShape, arm: LinearArm, limits: DeviceLimits) -> list[Tiles]:
    """The default first, then its neighbours; none where the library decides."""
    if arm is LinearArm.GEMM:
        return []
    choices = _gemv_choices if arm is LinearArm.GEMV else _flat_gemm_choices
    found = choices(shape, limits)
    if not limits.adds_parts_up:
        found = (replace(tiles, num_splits=1) for tiles in found)
    return list(dict.fromkeys(found))


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
    """As many rows for each program as its registers hold, fewer where multiprocessors would be left without.

    On 132 multiprocessors, which hold 10 programs each (42 registers, bfloat16, one row, sm_90), [4096, 4096] and
    [4096, 11008] are 512 programs, with 64 KiB in flight on each; [12288, 4096] 1,536 (1.2 waves), [22016, 4096] 2,752
    (2.1) and [32000, 4096] 4,000 (3.0), with 160 KiB. A program of 64 KiB takes at least 4 latencies, about 5 us, and
    the few programs of a last wave add at most that: to 57 us for 2,752 programs, to 84 for 4,000. For 1,536 the 216
    that are left over use the bandwidth meanwhile.
    """
    block_n = limits.gemv_rows
    while block_n > 1 and ceil(shape.out_features / block_n) < 2 * limits.num_multiprocessors:
        block_n //= 2
    return _gemv(shape, limits, block_n=block_n, num_warps=4)


def _gemv(shape: LinearShape, limits: DeviceLimits, *, block_n: int, num_warps: int) -> Tiles:
    """In one step each lane takes as many columns as its loads have: 16 bytes, or 8 bytes of int8."""
    columns = _GEMV_COLUMNS[shape.weight_format]
    return Tiles(block_n=block_n, block_k=columns * limits.lanes * num_warps, num_warps=num_warps)


def _flat_gemm_choices(shape: LinearShape, limits: DeviceLimits) -> Iterator[Tiles]:
    """The default, then blocks of other sizes, other splits, a deeper pipeline and more warps."""
    default = _default_flat_gemm(shape, limits)
    yield default
    if shape.weight_format in _ITEM_BYTES:
        for block_n, block_k in ((16, 256), (32, 256), (64, 128), (128, 64), (128, 128)):
            yield _flat_gemm(shape, limits, block_n=block_n, block_k=block_k)
        for num_splits in (2, 4):
            yield _flat_gemm(shape, limits, block_n=64, block_k=128, num_splits=num_splits)
        yield replace(default, num_warps=8)
    else:
        for block_n, num_splits in (*product((32, 64), (1, 2, 4, 8)), (128, 2), (128, 4)):
            yield _blocked_flat_gemm(shape, block_n=block_n, num_splits=num_splits)
        # Fewer instructions for each weight (int4, 8 rows: 2.5 instead of 2.8), and fewer programs at once.
        yield replace(default, block_k=2 * default.block_k)
    yield replace(default, num_stages=default.num_stages + 2)


def _default_flat_gemm(shape: LinearShape, limits: DeviceLimits) -> Tiles:
    if shape.weight_format not in _ITEM_BYTES:
        return _default_blocked_flat_gemm(shape, limits)
    return _default_dense_flat_gemm(shape, limits)


def _default_dense_flat_gemm(shape: LinearShape, limits: DeviceLimits) -> Tiles:
    """The narrowest blocks of N that all run at once, since the last ones of a second wave would run alone; 64 where
    there are many waves. K is split where N is too small for all multiprocessors.

    On 132 multiprocessors [4096, 4096] is 128 programs of 32 rows, [12288, 4096] 384 of 32, [22016, 4096] 344 of 64,
    [32000, 4096] 250 of 128. In flight on each multiprocessor are then 80 KiB (five stages of 16 KiB), 96 KiB (three
    programs, two of 16), 96 KiB (three, two of 16) and 128 KiB (two, two of 32).
    """
    for block_n, block_k in ((32, 256), (64, 128), (128, 128)):
        num_programs = ceil(shape.out_features / block_n)
        if num_programs <= _MAX_PROGRAMS * limits.num_multiprocessors:
            num_splits = _splits(shape, num_programs, 0.75 * limits.num_multiprocessors, _MIN_SPLIT_COLUMNS)
            return _flat_gemm(shape, limits, block_n=block_n, block_k=block_k, num_splits=num_splits)
    return _flat_gemm(shape, limits, block_n=64, block_k=128)


def _default_blocked_flat_gemm(shape: LinearShape, limits: DeviceLimits) -> Tiles:
    """Unpacking keeps CUDA cores busy, so there are to be three programs of two warps for each multiprocessor, of 64
    rows if that leaves enough of them: 2.8 instructions a weight (int4, counted on sm_90) instead of 3.2 with 32.

    On 132 multiprocessors [12288, 4096] is 192 blocks of N in 4 splits of K, [22016, 4096] 344 in 2, [32000, 4096] 500,
    [4096, 11008] 64 in 8, [4096, 4096] 128 of 32 rows in 4: 3.8 to 5.8 programs for each. Three stages of 256 columns
    of int4 are two buffers of 13 KiB (16 rows of x: 17), so that even 5.8 run at once (six by their 144 registers and
    35 KiB), with 16 KiB of weights in flight each. A fourth stage would leave some for a second wave.
    """
    wanted = _MAX_PROGRAMS * limits.num_multiprocessors
    for block_n in (64, 32):
        num_programs = ceil(shape.out_features / block_n)
        num_splits = _splits(shape, num_programs, wanted, _MIN_BLOCKED_SPLIT_COLUMNS)
        if num_programs * num_splits >= wanted:
            break
    return _blocked_flat_gemm(shape, block_n=block_n, num_splits=num_splits)


def _splits(shape: LinearShape, num_programs: int, wanted: float, min_columns: int) -> int:
    """Twice as many while there are fewer programs than wanted, and enough columns for each."""
    num_splits = 1
    while (
        num_splits * num_programs < wanted
        and shape.in_features >= 2 * num_splits * min_columns
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


def _blocked_flat_gemm(shape: LinearShape, *, block_n: int, num_splits: int) -> Tiles:
    block_k = 256 if shape.weight_format is WeightFormat.INT4 else 128
    return Tiles(block_n=block_n, block_k=block_k, num_splits=num_splits, num_warps=2, num_stages=3)
