"""What the engine needs of those who run its plans: one rank in this process, or many elsewhere."""

from typing import Protocol

from headrace.engine.plan import StepPlan, StepResult
from headrace.engine.rank_statistics import RankStatistics
from headrace.engine.trace import RankTrace


class Executor(Protocol):
    """Runs plans in the order given and returns what they sampled, in the same order.

    Every rank runs every plan after the one before it, so what an earlier plan writes to the cache is there for a later
    one, and is overwritten by a later one, never the other way round.
    """

    @property
    def max_in_flight(self) -> int:
        """Plans that are worth having submitted and not collected: one for each stage of a pipeline."""
        ...

    @property
    def failure(self) -> str | None:
        """Why the ranks can no longer work together, once that is so. From any thread, and without waiting."""
        ...

    @property
    def silence(self) -> tuple[str, float]:
        """The rank that has shown no sign of life for the longest time, and for how many seconds. As `failure`."""
        ...

    def submit(self, plan: StepPlan) -> None:
        """Start a step. At most max_in_flight are open at a time."""
        ...

    def collect(self) -> StepResult:
        """What the oldest open plan sampled; waits for it.

        Raises:
            OutOfDeviceMemory: the plan was not run, as its step does not fit; the engine may ask for a smaller one.
        """
        ...

    def start_trace(self) -> None:
        """Keep steps and exchanges of every rank one by one from now on."""
        ...

    def take_traces(self) -> list[RankTrace]:
        """What every rank has kept since the last time, rank 0 first; while no plan is in flight."""
        ...

    def exchange_s(self) -> float:
        """Seconds that this rank has spent in exchanges with others so far, waiting included."""
        ...

    def statistics(self) -> list[RankStatistics]:
        """What every rank has counted so far, rank 0 first; while no plan is in flight."""
        ...

    def close(self) -> None:
        """End the ranks there are beside this one."""
        ...

    def reset(self) -> None:
        """Drop all open plans and forget every sequence, as after a step that failed half way."""
        ...
