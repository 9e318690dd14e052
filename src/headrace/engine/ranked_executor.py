"""The executor of many ranks: rank 0 says what to run, and runs its own part."""

import json
import os
import time
import weakref
from typing import Any

from headrace.engine.plan import StepPlan, StepResult
from headrace.engine.rank_statistics import RankStatistics
from headrace.engine.trace import RankTrace
from headrace.engine.wire import Kind, decode_answer, encode_plan
from headrace.engine.worker import Worker
from headrace.errors import EngineStopped, OutOfDeviceMemory, RankError
from headrace.machine import host_id
from headrace.parallel.ledger import LedgerRow
from headrace.parallel.world import World

_CLOCK_QUESTIONS = 16


class RankedExecutor:
    """Rank 0's executor: sends each plan to every rank, runs its own part, hears from all whether it fitted, unless
    what they have exchanged says so, and takes the tokens of the last stage.

    Raises:
        RankError: a rank died, stalled or failed, from whatever was going on at that time; and
        EngineStopped: ever after.
    """

    def __init__(self, world: World, worker: Worker) -> None:
        self.worker = worker
        self._world = world
        self._config = world.place.config
        self._reporter = self._config.world_size - self._config.tensor_parallel_size
        self._own_answers: list[tuple[StepResult | OutOfDeviceMemory, bool]] = []
        """With each whether it is that of all ranks."""
        self._has_failed = False
        self._close = weakref.finalize(self, _close_in, os.getpid(), world)

    @property
    def max_in_flight(self) -> int:
        """A micro-batch for each stage."""
        return self._config.pipeline_parallel_size

    @property
    def failure(self) -> str | None:
        """Also while nothing runs: signs of life are exchanged all the time."""
        return self._world.failure

    @property
    def silence(self) -> tuple[str, float]:
        return self._world.silence

    def submit(self, plan: StepPlan) -> None:
        self._check()
        message = Kind.PLAN.value + encode_plan(plan)
        try:
            for rank in self._world.control:
                self._world.send(rank, message)
            answer = self.worker.try_to_execute(plan)
            # A GPU goes on where an exchange was cut short, with whatever its memory holds.
            self._world.check()
            self._own_answers.append((answer, self.worker.knows_of_all(plan)))
        except BaseException as error:
            raise self._failed(error) from None

    def collect(self) -> StepResult:
        """
        Raises:
            OutOfDeviceMemory: of any rank.
        """
        own, is_of_all = self._own_answers.pop(0)
        answers: list[StepResult | OutOfDeviceMemory | None] = [own]
        try:
            if not is_of_all:
                answers += [decode_answer(self._world.receive(rank)) for rank in self._world.control]
        except BaseException as error:
            raise self._failed(error) from None
        for answer in answers:
            if isinstance(answer, OutOfDeviceMemory):
                raise answer
        result = answers[self._reporter]
        assert isinstance(result, StepResult), "the rank that reports has said nothing"
        return result

    def reset(self) -> None:
        """After a step that failed half way the ranks cannot go on, as nobody knows how far each has come."""
        self._own_answers.clear()
        if not self._has_failed:
            self._failed(RankError("a step was cut short"))

    def ledger_rows(self) -> list[list[LedgerRow]]:
        """The rows of each rank's ledger, rank 0 first; while no plan is in flight."""
        self._check_idle()
        return [
            self.worker.ledger_rows(),
            *(list(map(LedgerRow.from_data, rows)) for rows in self._ask_all(Kind.LEDGER)),
        ]

    def start_trace(self) -> None:
        """Keep steps and exchanges of every rank one by one from now on."""
        self._check_idle()
        self.worker.start_trace()
        self._ask_all(Kind.START_TRACE)

    def take_traces(self) -> list[RankTrace]:
        """What every rank has kept since the last time, rank 0 first, on rank 0's clock."""
        self._check_idle()
        offsets_ns = [self._clock_offset_ns(rank) for rank in self._world.control]
        answers = zip(self._ask_all(Kind.TAKE_TRACE), offsets_ns, strict=True)
        own = self.worker.take_trace(str(self._world.place))
        return [own, *(RankTrace.from_data(data, offset_ns) for data, offset_ns in answers)]

    def _clock_offset_ns(self, rank: int) -> int:
        """How far another host's clock is ahead of this one's: of several questions, the one answered fastest tells,
        to half the time that took. Ranks of one host have one clock."""
        best_ns, offset_ns = 0, 0
        for _ in range(_CLOCK_QUESTIONS):
            asked_ns = time.monotonic_ns()
            self._world.send(rank, Kind.CLOCK.value)
            host, their_ns = json.loads(self._world.receive(rank))
            if host == host_id():
                return 0
            taken_ns = time.monotonic_ns() - asked_ns
            if not best_ns or taken_ns < best_ns:
                best_ns, offset_ns = taken_ns, their_ns - (asked_ns + taken_ns // 2)
        return offset_ns

    def exchange_s(self) -> float:
        """Seconds that this rank has spent in exchanges with others so far, waiting included."""
        return sum((row.wait_s or 0.0) + row.transfer_s for row in self.worker.ledger_rows())

    def statistics(self) -> list[RankStatistics]:
        """What every rank has counted so far, rank 0 first; while no plan is in flight."""
        self._check_idle()
        others = map(RankStatistics.from_data, self._ask_all(Kind.STATISTICS))
        return [self.worker.statistics(), *others]

    def exchange_differences(self) -> list[str]:
        """Where a rank's ledger differs from what its plans predict; while no plan is in flight."""
        self._check_idle()
        differences = [self.worker.exchange_differences(), *self._ask_all(Kind.DIFFERENCES)]
        return [f"rank {rank}: {line}" for rank, lines in enumerate(differences) for line in lines]

    def _ask_all(self, question: Kind) -> list[Any]:
        """The answers of all other ranks, in their order."""
        for rank in self._world.control:
            self._world.send(rank, question.value)
        return [json.loads(self._world.receive(rank)) for rank in self._world.control]

    def close(self) -> None:
        """End all ranks in order; also done when this object is forgotten, and when the program ends."""
        # NCCL lets nobody leave who has recordings of its exchanges.
        self.worker.decode_step.forget()
        self._close()

    def _check_idle(self) -> None:
        """Answers would be taken for results."""
        self._check()
        if self._own_answers:
            raise RuntimeError(f"{len(self._own_answers)} plans are in flight; collect them before asking ranks")

    def _check(self) -> None:
        if self._world.is_closed:
            raise EngineStopped("the model was closed; load it again")
        if self._world.failure is None:
            return
        if not self._has_failed:
            raise self._failed(RankError(self._world.failure))
        raise EngineStopped(f"{self._world.failure}; the other ranks have ended with it: load the model again")

    def _failed(self, error: BaseException) -> BaseException:
        self._has_failed = True
        # What was computed from an exchange that was cut short may fail in any way.
        is_consequence = self._world.failure is not None and isinstance(error, Exception)
        if self._world.failure is None:
            self._world.fail(error)
        if is_consequence or isinstance(error, RankError):
            return RankError(self._world.failure or "the model was closed")
        return error


def _close_in(process_id: int, world: World) -> None:
    """A forked child has copies of everything, and must not end what is its parent's."""
    if os.getpid() == process_id:
        world.close(Kind.END.value)
