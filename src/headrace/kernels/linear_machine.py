"""What linear layers and mixtures run on, as the dataflow sees it: what it may choose, and how that is timed."""

import time
from collections.abc import Callable, Sequence
from itertools import cycle
from typing import Protocol

import torch

from headrace.config import WeightFormat
from headrace.kernels.mixture_tuning import ExpertLaunch, MixtureShape
from headrace.kernels.tuning import Inflections, LinearArm, LinearShape, Tiles
from headrace.kernels.weights import Weight

DEFAULT_INFLECTIONS = Inflections(flat_gemm_from=2, gemm_from=96)
"""From 96 rows on x outgrows the L2 cache for the widths of common models, and reading W again costs less."""

_HALF_TILE_INFLECTIONS = Inflections(flat_gemm_from=2, gemm_from=4)
"""Of integer weights where only GEMM unpacks them into tiles: from 4 rows on that beats dot products of bytes."""

Stopwatch = Callable[[], float]
"""Runs something and returns the seconds that one call of it took."""


class Rotation:
    """The weights of one shape, used in turn: a model meets none of them twice in a step, so a time with the weight
    still in a cache would be one that never comes."""

    def __init__(self, weights: Sequence[Weight]) -> None:
        self.weights = weights
        self._turns = cycle(weights)

    def next(self) -> Weight:
        return next(self._turns)


class LinearMachine(Protocol):
    """What linear layers run on: how that is timed, and what is sound there before anything was measured."""

    @property
    def device(self) -> torch.device: ...

    @property
    def quick_rows(self) -> Sequence[int]:
        """Numbers of rows that are measured before a first use."""
        ...

    def default_inflections(self, shape: LinearShape) -> Inflections: ...

    def tiles(self, shape: LinearShape, arm: LinearArm) -> Sequence[Tiles]:
        """What an implementation may choose among, the default first; empty if it has no choice."""
        ...

    @property
    def expert_block_rows(self) -> Sequence[int]:
        """Of a mixture's launches: those that tiles can be chosen for; none where a mixture takes no tiles."""
        ...

    def expert_tiles(self, shape: MixtureShape, launch: ExpertLaunch) -> Sequence[Tiles]:
        """What a mixture's launch may choose among, the default first."""
        ...

    def can_run(self, run: Callable[[], object]) -> bool:
        """Whether tiles that were chosen for it compile and fit; runs it."""
        ...

    def stopwatch(self, run: Callable[[Weight], object], rotation: Rotation) -> Stopwatch: ...


class CpuMachine:
    """A CPU: implementations time themselves by being called, and cut their work up by themselves.

    is_batch_invariant: whether all of them give a row the same bits.
    """

    def __init__(self, *, is_batch_invariant: bool = True) -> None:
        self._is_batch_invariant = is_batch_invariant

    device = torch.device("cpu")
    quick_rows = (1, 2, 4, 8, 16, 32, 64, 128)
    expert_block_rows = ()

    def default_inflections(self, shape: LinearShape) -> Inflections:
        has_half_tiles = shape.weight_format in (WeightFormat.INT8, WeightFormat.INT4) and not self._is_batch_invariant
        return _HALF_TILE_INFLECTIONS if has_half_tiles else DEFAULT_INFLECTIONS

    def tiles(self, shape: LinearShape, arm: LinearArm) -> Sequence[Tiles]:  # noqa: ARG002
        return ()

    def expert_tiles(self, shape: MixtureShape, launch: ExpertLaunch) -> Sequence[Tiles]:  # noqa: ARG002
        return ()

    def can_run(self, run: Callable[[], object]) -> bool:
        run()
        return True

    def stopwatch(self, run: Callable[[Weight], object], rotation: Rotation) -> Stopwatch:
        def seconds() -> float:
            weight = rotation.next()
            start = time.perf_counter()
            run(weight)
            return time.perf_counter() - start

        return seconds
