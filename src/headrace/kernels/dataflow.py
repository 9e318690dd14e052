"""The choice of a linear layer's implementation at run time, and its measurement."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import date
from itertools import cycle

import torch
from torch import Tensor

from headrace.kernels.tuning import (
    Inflections,
    LinearArm,
    LinearShape,
    TunedShape,
    find_inflections,
)
from headrace.kernels.weights import Weight

DEFAULT_INFLECTIONS = Inflections(flat_gemm_from=2, gemm_from=96)
"""From 96 rows on x outgrows the L2 cache for the widths of common models, and reading W again costs less."""

_NEVER = 2**62

_FORCED = {
    LinearArm.GEMV: Inflections(flat_gemm_from=_NEVER, gemm_from=_NEVER),
    LinearArm.FLAT_GEMM: Inflections(flat_gemm_from=0, gemm_from=_NEVER),
    LinearArm.GEMM: Inflections(flat_gemm_from=0, gemm_from=0),
}

_HOPELESS = 2.0
"""GEMV reads W once for each row: this many times slower than the best, more rows will not bring it back."""


class Dataflow:
    """Which implementation multiplies how many rows: as measured where it was, else by default, or one forced on all.

    All give the same bits, so that the choice is one of speed alone and may change at any time; recorded steps keep
    what they were recorded with.
    """

    def __init__(self) -> None:
        self.tuned: dict[LinearShape, TunedShape] = {}
        self.max_pieces: int | None = None  # of a context in decode attention; None leaves it to the kernel
        self._forced: LinearArm | None = None

    def arm(self, shape: LinearShape, num_rows: int) -> LinearArm:
        return self.inflections(shape).arm(num_rows) if self._forced is None else self._forced

    def bounds(self, shape: LinearShape) -> Inflections:
        """What `arm` follows, for ops that learn the number of rows only while they run."""
        return self.inflections(shape) if self._forced is None else _FORCED[self._forced]

    def inflections(self, shape: LinearShape) -> Inflections:
        tuned = self.tuned.get(shape)
        return DEFAULT_INFLECTIONS if tuned is None else tuned.inflections

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

    @contextmanager
    def _forcing(self, arm: LinearArm) -> Iterator[None]:
        before, self._forced = self._forced, arm
        try:
            yield
        finally:
            self._forced = before

    def measure(
        self,
        linear: Callable[[Tensor, Weight], Tensor],
        weights: Sequence[Weight],
        shape: LinearShape,
        *,
        dtype: torch.dtype,
        num_rows: Sequence[int],
        num_rounds: int,
    ) -> TunedShape:
        """Time each implementation for each number of rows, and find where to change from one to the next.

        weights: all of that shape, used in turn: a model meets none of them twice in a step, so a time with the weight
            still in a cache would be one that never comes.
        Rounds go through the implementations in turn, so that a busy moment of the machine falls on all of them; each
        one's best round counts. The result is not yet in use: put it into `tuned`.

        dtype: of activations.
        """
        times: dict[LinearArm, dict[int, float]] = {arm: {} for arm in LinearArm}
        arms, next_weight = list(LinearArm), cycle(weights)
        for count in sorted(num_rows):
            x = torch.randn(count, shape.in_features).to(dtype)
            best_s = dict.fromkeys(arms, float("inf"))
            for _ in range(num_rounds):
                for arm in arms:
                    with self._forcing(arm):
                        best_s[arm] = min(best_s[arm], _seconds(linear, x, next(next_weight)))
            for arm, seconds in best_s.items():
                times[arm][count] = seconds
            if best_s.get(LinearArm.GEMV, 0.0) > _HOPELESS * min(best_s.values()):
                arms.remove(LinearArm.GEMV)
        return TunedShape(
            inflections=find_inflections(times, DEFAULT_INFLECTIONS),
            measured_on=date.today().isoformat(),
            times=times,
        )


def _seconds(linear: Callable[[Tensor, Weight], Tensor], x: Tensor, weight: Weight) -> float:
    start = time.perf_counter()
    linear(x, weight)
    return time.perf_counter() - start
