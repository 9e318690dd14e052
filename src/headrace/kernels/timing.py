"""How long calls take on a device, without the time that asking for them takes.

A GPU works off what it was asked for later: the host's clock shows when a call was queued. And a small kernel may be
over sooner than the next one can be asked for from Python. So calls are captured in a graph, as a decode step is, and
the device's own clock is read before and after it.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import cycle
from typing import Protocol, TypeVar

import torch

from headrace.kernels.capturing import capturing

Call = Callable[[], object]
C = TypeVar("C")

_MIN_GRAPH_CALLS = 24
"""Calls of one graph, at least: what starting a graph takes is shared by so many."""


class TimedCalls(Protocol):
    """Calls that do the same work, each on its own copy of what it reads, so that no cache serves the next one.

    is_captured: they were timed as a graph, and not one by one.
    """

    is_captured: bool

    def best_s(self, *, min_calls: int, min_s: float) -> float:
        """Seconds of a call, in the best of several measurements: so many calls at least, and so long."""
        ...


def time_calls(calls: Sequence[Call], device: torch.device) -> TimedCalls:
    """
    calls: at least one; on a GPU each is made once here, so that kernels are compiled before any is timed.
    """
    return _QueuedCalls(calls) if device.type == "cuda" else _HostCalls(calls)


def timer_of(calls: Sequence[Call], device: torch.device) -> Callable[[], float]:
    """For `best_of_rounds`: seconds of a call of `time_calls`, measured once."""
    return partial(time_calls(calls, device).best_s, min_calls=1, min_s=0.0)


def best_of_rounds(timers: Mapping[C, Callable[[], float]], num_rounds: int) -> dict[C, float]:
    """The least seconds that each timer gives.

    Rounds go through all of them in turn, so that a busy moment of the machine falls on all; each one's best counts.
    """
    best_s = dict.fromkeys(timers, float("inf"))
    for choice in [*timers] * num_rounds:
        best_s[choice] = min(best_s[choice], timers[choice]())
    return best_s


class _HostCalls:
    """Calls that are over when they return."""

    is_captured = False

    def __init__(self, calls: Sequence[Call]) -> None:
        self._calls = cycle(calls)

    def best_s(self, *, min_calls: int, min_s: float) -> float:
        best, num_calls, begin = float("inf"), 0, time.perf_counter()
        while num_calls < min_calls or time.perf_counter() - begin < min_s:
            call = next(self._calls)
            start = time.perf_counter()
            call()
            best = min(best, time.perf_counter() - start)
            num_calls += 1
        return best


class _QueuedCalls:
    """Calls on a GPU, all copies in turn in one graph; the time of one is the graph's over their number.

    What cannot be captured (an op that waits for the device, say) is queued call by call.
    """

    def __init__(self, calls: Sequence[Call]) -> None:
        self._calls = [*calls] * -(-_MIN_GRAPH_CALLS // len(calls))
        for call in calls:
            call()
        torch.cuda.synchronize()
        graph = _captured(self._calls)
        self.is_captured = graph is not None
        self._run: Call = self._queue if graph is None else graph.replay

    def best_s(self, *, min_calls: int, min_s: float) -> float:
        best, num_calls, begin = float("inf"), 0, time.perf_counter()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        while num_calls < min_calls or time.perf_counter() - begin < min_s:
            # The device is still busy with the first when the second is queued, so that it never waits for the host.
            self._run()
            start.record()
            self._run()
            end.record()
            end.synchronize()
            best = min(best, start.elapsed_time(end) / 1e3 / len(self._calls))
            num_calls += len(self._calls)
        return best

    def _queue(self) -> None:
        for call in self._calls:
            call()


def _captured(calls: Sequence[Call]) -> torch.cuda.CUDAGraph | None:
    graph = torch.cuda.CUDAGraph()
    try:
        with capturing(graph):
            for call in calls:
                call()
    except RuntimeError:
        torch.cuda.synchronize()  # an error of the device itself is raised here again
        return None
    return graph
