"""The executor of one rank in the engine's own thread."""

import torch

from headrace.engine.device_memory import release_cached, what_torch_says
from headrace.engine.plan import StepPlan, StepResult
from headrace.engine.trace import RankTrace
from headrace.engine.worker import Worker
from headrace.errors import OutOfDeviceMemory


class LocalExecutor:
    """Runs a plan when its result is asked for: with one thread, nothing could happen before."""

    max_in_flight = 1

    def __init__(self, worker: Worker) -> None:
        self.worker = worker
        self._plan: StepPlan | None = None

    def submit(self, plan: StepPlan) -> None:
        self._plan = plan

    def collect(self) -> StepResult:
        """
        Raises:
            OutOfDeviceMemory: the step does not fit. What the plan says of sequences is known all the same; none of its
                tokens counts as computed.
        """
        assert self._plan is not None, "nothing was submitted"
        try:
            return self.worker.execute(self._plan)
        except torch.OutOfMemoryError as error:
            reason = f"a step does not fit the memory of {self.worker.device}: {what_torch_says(error)}"
        # Here, where the error no longer holds what the step has made.
        release_cached(self.worker.device)
        raise OutOfDeviceMemory(f"{reason}; lower max_num_batched_tokens, or leave more free with memory_fraction")

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
