"""The choice of a linear layer's implementation at run time, and its measurement; and that of a mixture's tiles."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import date
from typing import TypeVar

import torch
from torch import Tensor

from headrace.kernels.linear_machine import CpuMachine, LinearMachine, Rotation, Stopwatch
from headrace.kernels.mixture_tuning import ExpertLaunch, MixtureShape, TunedMixture
from headrace.kernels.tuning import TIE, Inflections, LinearArm, LinearShape, Tiles, TunedShape, find_inflections
from headrace.kernels.weights import Weight

_NEVER = 2**62

_FORCED = {
    LinearArm.GEMV: Inflections(flat_gemm_from=_NEVER, gemm_from=_NEVER),
    LinearArm.FLAT_GEMM: Inflections(flat_gemm_from=0, gemm_from=_NEVER),
    LinearArm.GEMM: Inflections(flat_gemm_from=0, gemm_from=0),
}

_HOPELESS = 2.0
"""GEMV reads W once for each row: this many times slower than the best, more rows will not bring it back."""

_PROBE_ROWS = {LinearArm.GEMV: 1, LinearArm.FLAT_GEMM: 8, LinearArm.GEMM: 128}
"""Where tiles of an implementation are compared: the middle of the range it is for."""

Name = TypeVar("Name")


class Dataflow:
    """Which implementation multiplies how many rows: as measured where it was, else by default, or one forced on all.

    On a CPU all give the same bits, so that the choice is one of speed alone and may change at any time; on a GPU, and
    without batch invariance, each gives a row its bits whatever the other rows are. Recorded
    steps keep what they were recorded with.
    """

    def __init__(self, machine: LinearMachine | None = None) -> None:
        self.tuned: dict[LinearShape, TunedShape] = {}
        self.tuned_mixtures: dict[MixtureShape, TunedMixture] = {}
        self.max_pieces_from: Mapping[int, int | None] = {}  # by the least number of sequences it is for
        self.prefill_library_from: int | None = None  # tokens of a step; None leaves prompts to the kernel
        self._machine: LinearMachine = machine or CpuMachine()
        self._forced: LinearArm | None = None
        self._tried: Tiles | None = None
        self._default_tiles: dict[tuple[LinearShape, LinearArm], Tiles] = {}
        self._default_expert_tiles: dict[tuple[MixtureShape, ExpertLaunch], Tiles] = {}
        self._tried_expert_tiles: dict[ExpertLaunch, Tiles] = {}

    def max_pieces(self, num_seqs: int) -> int | None:
        """Of a context in decode attention, or programs of a GPU's launch, for a batch of so many sequences: the one
        measured for the nearest batch at or below its size. None leaves it to the kernel."""
        measured = max((n for n in self.max_pieces_from if n <= num_seqs), default=None)
        return None if measured is None else self.max_pieces_from[measured]

    @property
    def quick_rows(self) -> Sequence[int]:
        return self._machine.quick_rows

    def arm(self, shape: LinearShape, num_rows: int) -> LinearArm:
        return self.inflections(shape).arm(num_rows) if self._forced is None else self._forced

    def bounds(self, shape: LinearShape) -> Inflections:
        """What `arm` follows, for ops that learn the number of rows only while they run."""
        return self.inflections(shape) if self._forced is None else _FORCED[self._forced]

    def inflections(self, shape: LinearShape) -> Inflections:
        tuned = self.tuned.get(shape)
        return self.default_inflections(shape) if tuned is None else tuned.inflections

    def default_inflections(self, shape: LinearShape) -> Inflections:
        """Before anything was measured."""
        return self._machine.default_inflections(shape)

    def tiles(self, shape: LinearShape, arm: LinearArm) -> Tiles:
        """How an implementation that has a choice cuts this shape up, whatever the number of rows."""
        if self._tried is not None:
            return self._tried
        tuned = self.tuned.get(shape)
        if tuned is not None and arm in tuned.tiles:
            return tuned.tiles[arm]
        found = self._default_tiles.get((shape, arm))
        if found is None:
            found = self._default_tiles[shape, arm] = self._machine.tiles(shape, arm)[0]
        return found

    @property
    def expert_block_rows(self) -> Sequence[int]:
        return self._machine.expert_block_rows

    def expert_tile_choices(self, shape: MixtureShape, launch: ExpertLaunch) -> Sequence[Tiles]:
        return self._machine.expert_tiles(shape, launch)

    def can_run(self, run: Callable[[], object]) -> bool:
        """Whether tiles that were chosen for it compile and fit; runs it."""
        return self._machine.can_run(run)

    def expert_tiles(self, shape: MixtureShape, launch: ExpertLaunch) -> Tiles:
        """How one of a mixture's launches cuts its work up."""
        if launch in self._tried_expert_tiles:
            return self._tried_expert_tiles[launch]
        tuned = self.tuned_mixtures.get(shape)
        if tuned is not None and launch in tuned.tiles:
            return tuned.tiles[launch]
        found = self._default_expert_tiles.get((shape, launch))
        if found is None:
            found = self._default_expert_tiles[shape, launch] = self._machine.expert_tiles(shape, launch)[0]
        return found

    @contextmanager
    def trying_expert_tiles(self, launch: ExpertLaunch, tiles: Tiles) -> Iterator[None]:
        """One launch of every mixture takes these tiles, for a measurement."""
        self._tried_expert_tiles[launch] = tiles
        try:
            yield
        finally:
            del self._tried_expert_tiles[launch]

    def explain_mixture(self, shape: MixtureShape) -> str:
        """One line for people: which tiles are chosen, and on what grounds."""
        tuned = self.tuned_mixtures.get(shape)
        if tuned is None:
            return "default tiles (not measured here; `headrace tune` does)"
        chosen = "; ".join(f"{launch}: {tiles}" for launch, tiles in tuned.tiles.items())
        return f"{chosen} (measured on {tuned.measured_on})"

    def force(self, arm: LinearArm | None) -> None:
        """Run every linear layer on one implementation; None ends that."""
        self._forced = arm

    def explain(self, shape: LinearShape) -> str:
        """One line for people: what is chosen, and on what grounds."""
        if self._forced is not None:
            return f"{self._forced.value} for every M, as asked for"
        tuned = self.tuned.get(shape)
        grounds = "not measured here, the default" if tuned is None else f"measured on {tuned.measured_on}"
        return f"{self.inflections(shape)} ({grounds})"

    def source(self, shape: LinearShape) -> str:
        """The grounds of the choice in a word: forced, measured or default."""
        if self._forced is not None:
            return "forced"
        return "measured" if shape in self.tuned else "default"

    def ranges(self, shape: LinearShape) -> list[tuple[LinearArm, int, int | None]]:
        """What `arm` comes to: implementations with the least and the largest number of rows, None being no limit."""
        return self.inflections(shape).ranges() if self._forced is None else [(self._forced, 1, None)]

    @contextmanager
    def _forcing(self, arm: LinearArm, tiles: Tiles | None) -> Iterator[None]:
        before = self._forced, self._tried
        self._forced, self._tried = arm, tiles
        try:
            yield
        finally:
            self._forced, self._tried = before

    def measure(
        self,
        linear: Callable[[Tensor, Weight], Tensor],
        weights: Sequence[Weight],
        shape: LinearShape,
        *,
        dtype: torch.dtype,
        num_rows: Sequence[int],
        num_rounds: int,
        compares_tiles: bool = False,
    ) -> TunedShape:
        """Time each implementation for each number of rows, and find where to change from one to the next.

        weights: all of that shape, used in turn.
        compares_tiles: first find the best of the tiles each implementation may choose among, which on a GPU means
            compiling all of them; else the default ones are used.
        Rounds go through the implementations in turn, so that a busy moment of the machine falls on all of them; each
        one's best round counts. The result is not yet in use: put it into `tuned`.

        dtype: of activations.
        """
        times: dict[LinearArm, dict[int, float]] = {arm: {} for arm in LinearArm}
        arms, measuring = list(LinearArm), _Measurement(self, self._machine, linear, weights, shape, dtype, num_rounds)
        choices = {arm: list(self._machine.tiles(shape, arm)) for arm in LinearArm}
        if compares_tiles:
            tiles = {arm: measuring.best_tiles(arm, found) for arm, found in choices.items() if found}
        else:
            tiles = {arm: found[0] for arm, found in choices.items() if found}
        for count in sorted(num_rows):
            best_s = measuring.best_seconds(count, {arm: (arm, tiles.get(arm)) for arm in arms})
            for arm, seconds in best_s.items():
                times[arm][count] = seconds
            if best_s.get(LinearArm.GEMV, 0.0) > _HOPELESS * min(best_s.values()):
                arms.remove(LinearArm.GEMV)
        return TunedShape(
            inflections=find_inflections(times, self._machine.default_inflections(shape)),
            measured_on=date.today().isoformat(),
            times=times,
            tiles=tiles,
        )


class _Measurement:
    """Times of one shape."""

    def __init__(
        self,
        dataflow: Dataflow,
        machine: LinearMachine,
        linear: Callable[[Tensor, Weight], Tensor],
        weights: Sequence[Weight],
        shape: LinearShape,
        dtype: torch.dtype,
        num_rounds: int,
    ) -> None:
        self._dataflow, self._machine, self._linear = dataflow, machine, linear
        self._shape, self._dtype, self._num_rounds = shape, dtype, num_rounds
        self._rotation = Rotation(weights)

    def best_tiles(self, arm: LinearArm, choices: Sequence[Tiles]) -> Tiles:
        """The first of those within TIE of the fastest."""
        if len(choices) == 1:
            return choices[0]
        best_s = self.best_seconds(_PROBE_ROWS[arm], {tiles: (arm, tiles) for tiles in choices})
        limit_s = TIE * min(best_s.values())
        return next(tiles for tiles in choices if best_s[tiles] <= limit_s)

    def best_seconds(self, num_rows: int, variants: Mapping[Name, tuple[LinearArm, Tiles | None]]) -> dict[Name, float]:
        """The best round of each variant."""
        x = torch.randn(num_rows, self._shape.in_features).to(self._machine.device, self._dtype)
        watches: dict[Name, Stopwatch] = {}
        for name, variant in variants.items():
            # What a stopwatch runs may be recorded now, or called each time.
            with self._dataflow._forcing(*variant):
                watches[name] = self._machine.stopwatch(lambda weight: self._linear(x, weight), self._rotation)
        best_s = dict.fromkeys(variants, math.inf)
        for _ in range(self._num_rounds):
            for name, variant in variants.items():
                with self._dataflow._forcing(*variant):
                    best_s[name] = min(best_s[name], watches[name]())
        return best_s
