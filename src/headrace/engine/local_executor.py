"""The executor of one rank in the engine's own thread."""

import gc

from headrace.engine.device_memory import release_cached
from headrace.engine.plan import StepPlan, StepResult
from headrace.engine.rank_statistics import RankStatistics
from headrace.engine.trace import RankTrace
from headrace.engine.worker import Worker
from headrace.errors import EngineStopped


class LocalExecutor:
    """Runs a plan when its result is asked for: with one thread, nothing could happen before."""

    max_in_flight = 1
    failure = None
    silence = ("rank 0", 0.0)

    def __init__(self, worker: Worker) -> None:
        self._worker: Worker | None = worker
        self._plan: StepPlan | None = None

    @property
    def worker(self) -> Worker:
        """
        Raises:
            EngineStopped: this object was closed.
        """
        if self._worker is None:
            raise EngineStopped("the model was closed; load it again")
        return self._worker

    def submit(self, plan: StepPlan) -> None:
        self._plan = plan

    def collect(self) -> StepResult:
        """
        Raises:
            OutOfDeviceMemory: see `Worker.execute`.
        """
        plan, worker = self._plan, self._worker
        assert plan is not None, "nothing was submitted"
        return (worker or self.worker).execute(plan)

    def start_trace(self) -> None:
        self.worker.start_trace()

    def take_traces(self) -> list[RankTrace]:
        return [self.worker.take_trace("rank 0")]

    def exchange_s(self) -> float:
        return 0.0

    def statistics(self) -> list[RankStatistics]:
        return [self.worker.statistics()]

    def close(self) -> None:
        """Give the memory of weights and cache back."""
        if self._worker is None:
            return
        device, self._worker, self._plan = self._worker.device, None, None
        # A runner and its recorded steps refer to each other.
        gc.collect()
        release_cached(device)

    def reset(self) -> None:
        self._plan = None
        if self._worker is not None:
            self._worker.reset()
