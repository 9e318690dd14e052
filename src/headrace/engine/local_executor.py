"""The executor of one rank in the engine's own thread."""

from headrace.engine.plan import StepPlan, StepResult
from headrace.engine.trace import RankTrace
from headrace.engine.worker import Worker


class LocalExecutor:
    """Runs a plan when its result is asked for: with one thread, nothing could happen before."""

    max_in_flight = 1

    def __init__(self, worker: Worker) -> None:
        self.worker = worker
        self._plan: StepPlan | None = None

    def submit(self, plan: StepPlan) -> None:
        self._plan = plan

    def collect(self) -> StepResult:
        assert self._plan is not None, "nothing was submitted"
        return self.worker.execute(self._plan)

    def start_trace(self) -> None:
        self.worker.start_trace()

    def take_traces(self) -> list[RankTrace]:
        return [self.worker.take_trace("rank 0")]

    def exchange_s(self) -> float:
        return 0.0

    def close(self) -> None:
        pass

    def reset(self) -> None:
        self._plan = None
        self.worker.reset()
