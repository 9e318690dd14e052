"""What every unit works with: the device, the ops, a clock, and how what was computed is compared."""

from __future__ import annotations

import time
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from headrace.kernels import Kernels, kernel_choice_from, resolve_kernels
from headrace.kernels.timing import Call, time_calls
from scripts.gpu_check.scale import Scale

TOLERANCE = {torch.bfloat16: 1e-2, torch.float32: 1e-4}
"""Of ||out - reference|| / ||reference||: rounding a result to bfloat16 alone gives 0.002, and its operands as much
again; float32 accumulates in another order than the reference does. What peers round in between, probabilities and the
parts of a sum, brings that to 0.004. A mask that lies one token off gives 0.03 for a token after 512, and 0.4 for a
prompt."""

Runs = Mapping[str, Sequence[Callable[[], Tensor]]]
"""By name, a call for each copy of what it reads."""


@dataclass(frozen=True, kw_only=True)
class Time:
    """Of one call. best_s: of all rounds; slowest_s: the best of the slowest round; infinite where none was timed."""

    best_s: float
    slowest_s: float
    is_captured: bool


@dataclass(kw_only=True)
class Context:
    """folder: for checkpoints. deadline_s: of time.time(), when all must be over.

    compiles_only: every kernel is launched once, so that it is compiled and kept for the run that measures.
    """

    device: torch.device
    dtype: torch.dtype
    scale: Scale
    folder: Path
    deadline_s: float
    compiles_only: bool = False
    unit: str = ""
    report: Callable[[str, str, bool], None] = field(default=lambda _part, _message, _is_failure: None)

    @cached_property
    def kernels(self) -> Kernels:
        return resolve_kernels(kernel_choice_from(), device=self.device)

    def seconds_left(self) -> float:
        return self.deadline_s - time.time()

    def num_copies(self, num_bytes: int) -> int:
        """So many that the device's cache holds none of them when its turn comes again."""
        if self.compiles_only:
            return 1
        working_set = self.scale.working_set_bytes
        if self.device.type == "cuda":
            working_set = max(working_set, 4 * torch.cuda.get_device_properties(self.device).L2_cache_size)
        return max(1, -(-working_set // max(1, num_bytes)))

    def errors(self, runs: Runs, expected: Tensor) -> dict[str, float]:
        """Of each one's first call; one that fails is reported and left out."""
        found = {}
        for name, calls in runs.items():
            try:
                found[name] = self.error(calls[0], expected)
            except Exception as error:
                self.part_failed(name, error)
        return found

    def race_right(self, runs: Runs, errors: Mapping[str, float], peers: Container[str]) -> dict[str, Time]:
        """`race` those that were compared, but for peers that are not right. What is no peer is timed all the same: it
        is marked, and nothing else is compared with it."""
        wrong = [name for name, error in errors.items() if name in peers and not error <= TOLERANCE[self.dtype]]
        times = self.race({name: runs[name] for name in errors if name not in wrong})
        return times if self.compiles_only else times | {name: self.not_timed(name, errors[name]) for name in wrong}

    def not_timed(self, peer: str, error: float) -> Time:
        """Say that a peer computes something else."""
        self.report(peer, f"differs from the reference by {error:.2g}", True)
        return Time(best_s=float("inf"), slowest_s=float("inf"), is_captured=False)

    def race(self, runs: Runs) -> dict[str, Time]:
        """Time all of them, in rounds in which each has its turn; one that fails is reported and left out."""
        if self.compiles_only:
            self._run_once(runs)
            return {}
        timed = {}
        for name, calls in runs.items():
            try:
                timed[name] = time_calls(calls, self.device)
            except Exception as error:
                self.part_failed(name, error)
        rounds: dict[str, list[float]] = {name: [] for name in timed}
        for _ in range(self.scale.num_rounds):
            for name in tuple(rounds):
                try:
                    seconds = timed[name].best_s(min_calls=self.scale.min_calls, min_s=self.scale.min_s)
                except Exception as error:
                    self.part_failed(name, error)
                    del rounds[name]
                else:
                    rounds[name].append(seconds)
        return {
            name: Time(best_s=min(found), slowest_s=max(found), is_captured=timed[name].is_captured)
            for name, found in rounds.items()
        }

    def time_once(self, call: Call, *, num_rounds: int | None = None) -> Time:
        """Calls so long that asking for them does not matter, one by one, until the device has done each."""
        found = []
        for _ in range(num_rounds or self.scale.num_rounds):
            self.synchronize()
            start = time.perf_counter()
            call()
            self.synchronize()
            found.append(time.perf_counter() - start)
        return Time(best_s=min(found), slowest_s=max(found), is_captured=False)

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def error(self, run: Callable[[], Tensor], expected: Tensor) -> float:
        """Of what `run` gives, written where there was NaN before; infinite if any of it is no number."""
        poison(expected.numel(), self.device)
        actual = run().float()
        difference = (actual.reshape(expected.shape) - expected.float()).norm() / expected.float().norm()
        value = difference.item()
        return value if value == value else float("inf")

    def randn(self, *size: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.randn(size, device=self.device).to(dtype or self.dtype)

    def _run_once(self, runs: Runs) -> None:
        for name, calls in runs.items():
            try:
                calls[0]()
                self.synchronize()
            except Exception as error:
                self.part_failed(name, error)

    def part_failed(self, name: str, error: Exception) -> None:
        self.report(name, describe(error), True)


def poison(num_entries: int, device: torch.device) -> None:
    """Leave NaN in the memory that the allocator is likely to give to the next output of such a size."""
    for size in (2 * num_entries, 4 * num_entries):
        torch.full((size,), 255, dtype=torch.uint8, device=device)


def describe(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}" if text else type(error).__name__
