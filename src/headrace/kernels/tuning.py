"""Heuristic dataflow: which of three linear implementations multiplies how many rows, measured once per machine.

Source: FlashDecoding++ (arXiv:2311.01282), section 5: for each [N, K] of a model two inflection points M1 and M2 are
measured offline and looked up at run time. Where the paper takes the first crossing, this takes the pair of points with
the least total regret over all M measured: one noisy timing, or a crossing that never comes, does not lead it astray.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from enum import Enum
from itertools import combinations_with_replacement
from typing import Any

from headrace.config import WeightFormat
from headrace.kernels.tuning_cache import Section

TIE = 1.02
"""Two times within this ratio are equal: noise is larger than what choosing between them could win."""


class LinearArm(Enum):
    """The implementations of a linear layer, in the order in which a growing M makes them the fastest."""

    GEMV = "gemv"
    FLAT_GEMM = "flat_gemm"
    GEMM = "gemm"


@dataclass(frozen=True, kw_only=True)
class LinearShape:
    """A weight [N, K] and how it is stored."""

    weight_format: WeightFormat
    out_features: int
    in_features: int

    def __str__(self) -> str:
        return f"[{self.out_features}, {self.in_features}] {self.weight_format.value}"


@dataclass(frozen=True, kw_only=True)
class Inflections:
    """M1 and M2: GEMV below flat_gemm_from rows, flat GEMM from there and below gemm_from, GEMM from there."""

    flat_gemm_from: int
    gemm_from: int

    def arm(self, num_rows: int) -> LinearArm:
        if num_rows < self.flat_gemm_from:
            return LinearArm.GEMV
        return LinearArm.FLAT_GEMM if num_rows < self.gemm_from else LinearArm.GEMM

    def ranges(self) -> list[tuple[LinearArm, int, int | None]]:
        """Each implementation that is used at all, with the least and the largest number of rows; None: no limit."""
        bounds = [1, self.flat_gemm_from, self.gemm_from, None]
        return [
            (arm, first, None if until is None else until - 1)
            for arm, first, until in zip(LinearArm, bounds, bounds[1:], strict=False)
            if first is not None and (until is None or until > first)
        ]

    def __str__(self) -> str:
        *bounded, (last, _, _) = self.ranges()
        if not bounded:
            return f"{_NAMES[last]} for every M"
        below = ", ".join(f"{_NAMES[arm]} below M = {until + 1}" for arm, _, until in bounded if until is not None)
        return f"{below}, then {_NAMES[last]}"


_NAMES = {LinearArm.GEMV: "GEMV", LinearArm.FLAT_GEMM: "flat GEMM", LinearArm.GEMM: "GEMM"}


@dataclass(frozen=True, kw_only=True)
class Tiles:
    """How an implementation on a GPU cuts a product up among programs.

    block_n, block_k: rows and columns of W in one step of one program.
    num_splits: parts of K that different programs sum up; part of what decides the bits of a result.
    num_warps: of a program; num_stages: tiles of the loop's pipeline, 1 for loads into registers.
    """

    block_n: int
    block_k: int
    num_splits: int = 1
    num_warps: int = 4
    num_stages: int = 1

    def __str__(self) -> str:
        splits = f" in {self.num_splits} splits" if self.num_splits > 1 else ""
        return f"{self.block_n} x {self.block_k}{splits}, {self.num_warps} warps, {self.num_stages} stages"


ArmTimes = Mapping[LinearArm, Mapping[int, float]]
"""Seconds by arm and number of rows; an arm that was given up has no entry for larger numbers."""


def find_inflections(times: ArmTimes, default: Inflections) -> Inflections:
    """The points with the least regret: the sum over M of log(time of the arm chosen / time of the best).

    Ratios within TIE count as 1. Of equals those nearest to the default are taken. An arm without times is not chosen.
    """
    measured = sorted(set().union(*times.values()))
    points = sorted({*measured, measured[-1] + 1, default.flat_gemm_from, default.gemm_from})
    pairs = (Inflections(flat_gemm_from=a, gemm_from=b) for a, b in combinations_with_replacement(points, 2))
    possible = (pair for pair in pairs if all(arm in times for arm, _, _ in pair.ranges()))
    return min(possible, key=lambda pair: (_regret(times, measured, pair), _distance(pair, default)))


def _regret(times: ArmTimes, measured: Sequence[int], pair: Inflections) -> float:
    total = 0.0
    for num_rows in measured:
        best_s = min(seconds[num_rows] for seconds in times.values() if num_rows in seconds)
        chosen_s = times[pair.arm(num_rows)].get(num_rows, math.inf)
        total += math.log(chosen_s / best_s) if chosen_s > TIE * best_s else 0.0
    return round(total, 9)


def _distance(pair: Inflections, default: Inflections) -> float:
    return abs(math.log(pair.flat_gemm_from / default.flat_gemm_from)) + abs(
        math.log(pair.gemm_from / default.gemm_from)
    )


@dataclass(frozen=True, kw_only=True)
class TunedShape:
    """times: what was measured, for people, plots and the ablation; what runs follows inflections and tiles alone.

    tiles: the best found for each implementation that has a choice of them.
    """

    inflections: Inflections
    measured_on: str
    times: ArmTimes = field(default_factory=dict)
    tiles: Mapping[LinearArm, Tiles] = field(default_factory=dict)


def _to_json(shape: LinearShape, tuned: TunedShape) -> dict[str, Any]:
    return {
        "weight_format": shape.weight_format.value,
        "out_features": shape.out_features,
        "in_features": shape.in_features,
        **asdict(tuned.inflections),
        "measured_on": tuned.measured_on,
        "seconds": {arm.value: {str(m): s for m, s in by_rows.items()} for arm, by_rows in tuned.times.items()},
        "tiles": {arm.value: asdict(tiles) for arm, tiles in tuned.tiles.items()},
    }


def _from_json(entry: dict[str, Any]) -> tuple[LinearShape, TunedShape]:
    shape = LinearShape(
        weight_format=WeightFormat(entry["weight_format"]),
        out_features=int(entry["out_features"]),
        in_features=int(entry["in_features"]),
    )
    inflections = Inflections(flat_gemm_from=int(entry["flat_gemm_from"]), gemm_from=int(entry["gemm_from"]))
    times = {LinearArm(arm): {int(m): float(s) for m, s in rows.items()} for arm, rows in entry["seconds"].items()}
    tiles = {LinearArm(arm): _tiles_from_json(found) for arm, found in entry.get("tiles", {}).items()}
    return shape, TunedShape(inflections=inflections, measured_on=str(entry["measured_on"]), times=times, tiles=tiles)


def _tiles_from_json(entry: dict[str, Any]) -> Tiles:
    return Tiles(**{name: int(value) for name, value in entry.items()})


LINEAR = Section(name="linear", to_json=_to_json, from_json=_from_json)
