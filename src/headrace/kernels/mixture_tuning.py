"""Which tiles suit the experts of a mixture on a GPU, measured for both of their matrices and for few and many tokens.

Experts are multiplied in one launch for all of them, whose blocks take a fixed number of rows, chosen by how many
tokens an expert has on average. For each such number, and for each of the two matrices, tiles are compared by the time
of the whole mixture.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from enum import Enum
from functools import cached_property
from typing import Any

from headrace.config import WeightFormat
from headrace.kernels.tuning import TIE, Tiles
from headrace.kernels.tuning_cache import Section


class ExpertMatrix(Enum):
    UP = "up"
    DOWN = "down"


@dataclass(frozen=True, kw_only=True)
class MixtureShape:
    """Experts of [2 * intermediate_size, hidden_size] and back; activation_bytes: of one entry of what they take."""

    weight_format: WeightFormat
    activation_bytes: int
    num_experts: int
    hidden_size: int
    intermediate_size: int

    def __str__(self) -> str:
        sizes = f"[2 x {self.intermediate_size}, {self.hidden_size}]"
        return f"{self.num_experts} experts of {sizes} {self.weight_format.value}"


@dataclass(frozen=True, kw_only=True)
class ExpertLaunch:
    """One of a mixture's launches: for which matrix, and how many of an expert's tokens a block takes."""

    matrix: ExpertMatrix
    block_rows: int

    def __str__(self) -> str:
        return f"{self.matrix.value}, {self.block_rows} rows"


@dataclass(frozen=True, kw_only=True)
class TunedMixture:
    """times: seconds of the whole mixture, by launch and the tiles it was given, the default first."""

    measured_on: str
    times: Mapping[ExpertLaunch, Mapping[Tiles, float]]

    @cached_property
    def tiles(self) -> Mapping[ExpertLaunch, Tiles]:
        """For each launch the first of the tiles within TIE of the fastest."""
        return {launch: _best(seconds) for launch, seconds in self.times.items()}


def _best(seconds: Mapping[Tiles, float]) -> Tiles:
    limit_s = TIE * min(seconds.values())
    return next(tiles for tiles, found_s in seconds.items() if found_s <= limit_s)


def _to_json(shape: MixtureShape, tuned: TunedMixture) -> dict[str, Any]:
    return {
        **asdict(shape),
        "weight_format": shape.weight_format.value,
        "measured_on": tuned.measured_on,
        "times": [
            {
                "matrix": launch.matrix.value,
                "block_rows": launch.block_rows,
                "tiles": asdict(tiles),
                "seconds": found_s,
            }
            for launch, seconds in tuned.times.items()
            for tiles, found_s in seconds.items()
        ],
    }


def _from_json(entry: dict[str, Any]) -> tuple[MixtureShape, TunedMixture]:
    sizes = {name: int(entry[name]) for name in ("activation_bytes", "num_experts", "hidden_size", "intermediate_size")}
    times: dict[ExpertLaunch, dict[Tiles, float]] = {}
    for row in entry["times"]:
        launch = ExpertLaunch(matrix=ExpertMatrix(row["matrix"]), block_rows=int(row["block_rows"]))
        tiles = Tiles(**{name: int(value) for name, value in row["tiles"].items()})
        times.setdefault(launch, {})[tiles] = float(row["seconds"])
    shape = MixtureShape(weight_format=WeightFormat(entry["weight_format"]), **sizes)
    return shape, TunedMixture(measured_on=str(entry["measured_on"]), times=times)


MIXTURE = Section(name="mixture", to_json=_to_json, from_json=_from_json)
