"""Plans between the scheduler and the ranks."""

import logging
import time
from collections import deque
from collections.abc import Iterator
from contextlib import suppress

from headrace.engine.engine_counters import EngineCounters
from headrace.engine.executor import Executor
from headrace.engine.guides import Guides
from headrace.engine.open_requests import OpenRequests
from headrace.engine.outputs import RequestUpdate
from headrace.engine.plan import StepPlan
from headrace.engine.prompt_pace import PromptPace
from headrace.engine.scheduler import Scheduler
from headrace.errors import OutOfDeviceMemory

logger = logging.getLogger(__name__)


class StepsInFlight:
    """Keeps as many plans in flight as the ranks can run at the same time, and undoes those that find no memory.

    pace: limits the prompt tokens of a step; None does not.
    """

    def __init__(
        self,
        executor: Executor,
        scheduler: Scheduler,
        requests: OpenRequests,
        guides: Guides,
        counters: EngineCounters,
        pace: PromptPace | None,
    ) -> None:
        self._executor = executor
        self._scheduler = scheduler
        self._requests = requests
        self._guides = guides
        self._counters = counters
        self._pace = pace
        self.in_flight: deque[StepPlan] = deque()
        """The oldest first."""
        self._is_last_try = False
        """A step of one request has found no room, and is about to be tried again."""

    def advance(self, start_s: float) -> list[RequestUpdate]:
        """What the oldest step brings, once the ranks have as many as they can run at the same time.

        start_s: now; see `time.monotonic`.
        """
        self._fill()
        return self._collect(start_s)

    def drain(self) -> Iterator[RequestUpdate]:
        """What all steps in flight bring; none is begun."""
        while self.in_flight:
            yield from self._collect()

    def give_up(self) -> None:
        """Wait for the steps in flight, and undo them."""
        self._scheduler.undo(self._drop())

    def _fill(self) -> None:
        in_flight, executor, pace = self.in_flight, self._executor, self._pace
        while len(in_flight) < executor.max_in_flight:
            plan = self._scheduler.schedule(None if pace is None else pace.limit)
            if plan is None:
                return
            if plan.new:
                self._requests.mark_scheduled(plan, time.monotonic())
            plan = self._guides.masked(plan)
            executor.submit(plan)
            in_flight.append(plan)
            if not plan.chunks:
                return

    def _collect(self, start_s: float | None = None) -> list[RequestUpdate]:
        """start_s: since when the oldest step's ranks had nothing else to do for it; None if that is not known."""
        plan = self.in_flight.popleft()
        try:
            result = self._executor.collect()
        except OutOfDeviceMemory as error:
            return self._make_room(plan, str(error))
        self._is_last_try = False
        now_s = time.monotonic()
        if self._pace is not None and start_s is not None:
            self._pace.record(plan.num_prefill_tokens, now_s - start_s)
        self._counters.count_step(plan)
        return self._requests.take(plan, result, self._scheduler, now_s)

    def _make_room(self, plan: StepPlan, reason: str) -> list[RequestUpdate]:
        """Undo a plan that did not fit, and those that were begun after it: they may attend to what it left undone."""
        self._scheduler.undo([plan, *self._drop()])
        if self._scheduler.preempt_newest():
            logger.warning("%s; the newest of %d requests waits", reason, len(self._requests))
            return []
        if not self._scheduler.num_running:
            # Whoever it was for has left.
            return []
        if not self._is_last_try:
            # What torch had kept of the device's memory is free now, and in fewer pieces.
            self._is_last_try = True
            return []
        self._is_last_try = False
        failed = self._requests.fail(self._scheduler.oldest_running.seq_id, reason, self._scheduler)
        return [self._requests.update(failed, time.monotonic())]

    def _drop(self) -> list[StepPlan]:
        """All plans in flight, whose results nobody wants."""
        rest = list(self.in_flight)
        self.in_flight.clear()
        for _ in rest:
            with suppress(OutOfDeviceMemory):
                self._executor.collect()
        return rest
