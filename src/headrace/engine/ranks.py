"""All ranks of an engine: how they start, agree on the cache, follow rank 0 and end."""

import json
import os
import time
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from headrace.costs.sites import Phase
from headrace.engine.load_rank import LoadedRank
from headrace.engine.plan import StepPlan, StepResult
from headrace.engine.trace import RankTrace
from headrace.engine.wire import decode_plan, decode_result, encode_plan, encode_result
from headrace.engine.worker import Worker
from headrace.errors import EngineStopped, RankError
from headrace.machine import available_memory_bytes, host_id
from headrace.parallel.ledger import LedgerRow
from headrace.parallel.world import World

_PLAN, _LEDGER, _DIFFERENCES, _END = b"p", b"l", b"d", b"e"
_START_TRACE, _TAKE_TRACE, _CLOCK = b"s", b"t", b"c"
"""First byte of what rank 0 says to the others."""

_CLOCK_QUESTIONS = 16


@dataclass(frozen=True, kw_only=True)
class RankReport:
    """What rank 0 must know of a rank to size the cache. host: equal for ranks that share memory."""

    host: str
    block_bytes: int
    available_bytes: int
    weight_bytes: int

    @classmethod
    def of(cls, loaded: LoadedRank) -> "RankReport":
        return cls(
            host=host_id(),
            block_bytes=loaded.block_bytes,
            available_bytes=available_memory_bytes(),
            weight_bytes=loaded.weight_bytes,
        )


def tightest_host(reports: Sequence[RankReport]) -> tuple[int, int]:
    """(block_bytes, available_bytes) of the host with room for the fewest blocks; a block is one of all its ranks."""
    rooms = {}
    for host in {report.host for report in reports}:
        there = [report for report in reports if report.host == host]
        rooms[host] = (sum(r.block_bytes for r in there), min(r.available_bytes for r in there))
    return min(rooms.values(), key=lambda room: room[1] / room[0])


class RankedExecutor:
    """Rank 0's executor: sends each plan to every rank, runs its own part, and takes the tokens of the last stage.

    Raises:
        RankError: a rank died, stalled or failed, from whatever was going on at that time; and
        EngineStopped: ever after.
    """

    def __init__(self, world: World, worker: Worker) -> None:
        self.worker = worker
        self._world = world
        self._config = world.place.config
        self._reporter = self._config.world_size - self._config.tensor_parallel_size
        self._own_results: list[StepResult] = []
        self._has_failed = False
        self._close = weakref.finalize(self, _close_in, os.getpid(), world)

    @property
    def max_in_flight(self) -> int:
        """A micro-batch for each stage."""
        return self._config.pipeline_parallel_size

    def submit(self, plan: StepPlan) -> None:
        self._check()
        message = _PLAN + encode_plan(plan)
        try:
            for rank in self._world.control:
                self._world.send(rank, message)
            self._own_results.append(self.worker.execute(plan))
        except BaseException as error:
            raise self._failed(error) from None

    def collect(self) -> StepResult:
        result = self._own_results.pop(0)
        if self._reporter == 0:
            return result
        try:
            return decode_result(self._world.receive(self._reporter))
        except BaseException as error:
            raise self._failed(error) from None

    def reset(self) -> None:
        """After a step that failed half way the ranks cannot go on, as nobody knows how far each has come."""
        self._own_results.clear()
        if not self._has_failed:
            self._failed(RankError("a step was cut short"))

    def ledger_rows(self) -> list[list[LedgerRow]]:
        """The rows of each rank's ledger, rank 0 first; while no plan is in flight."""
        self._check_idle()
        return [_ledger_rows(self.worker), *(list(map(_as_ledger_row, rows)) for rows in self._ask_all(_LEDGER))]

    def start_trace(self) -> None:
        """Keep steps and exchanges of every rank one by one from now on."""
        self._check_idle()
        self.worker.start_trace()
        self._ask_all(_START_TRACE)

    def take_traces(self) -> list[RankTrace]:
        """What every rank has kept since the last time, rank 0 first, on rank 0's clock."""
        self._check_idle()
        offsets_ns = [self._clock_offset_ns(rank) for rank in self._world.control]
        answers = zip(self._ask_all(_TAKE_TRACE), offsets_ns, strict=True)
        own = self.worker.take_trace(str(self._world.place))
        return [own, *(RankTrace.from_data(data, offset_ns) for data, offset_ns in answers)]

    def _clock_offset_ns(self, rank: int) -> int:
        """How far another host's clock is ahead of this one's: of several questions, the one answered fastest tells,
        to half the time that took. Ranks of one host have one clock."""
        best_ns, offset_ns = 0, 0
        for _ in range(_CLOCK_QUESTIONS):
            asked_ns = time.monotonic_ns()
            self._world.send(rank, _CLOCK)
            host, their_ns = json.loads(self._world.receive(rank))
            if host == host_id():
                return 0
            taken_ns = time.monotonic_ns() - asked_ns
            if not best_ns or taken_ns < best_ns:
                best_ns, offset_ns = taken_ns, their_ns - (asked_ns + taken_ns // 2)
        return offset_ns

    def exchange_s(self) -> float:
        """Seconds that this rank has spent in exchanges with others so far, waiting included."""
        return sum((row.wait_s or 0.0) + row.transfer_s for row in _ledger_rows(self.worker))

    def exchange_differences(self) -> list[str]:
        """Where a rank's ledger differs from what its plans predict; while no plan is in flight."""
        self._check_idle()
        differences = [self.worker.exchange_differences(), *self._ask_all(_DIFFERENCES)]
        return [f"rank {rank}: {line}" for rank, lines in enumerate(differences) for line in lines]

    def _ask_all(self, question: bytes) -> list[Any]:
        """The answers of all other ranks, in their order."""
        for rank in self._world.control:
            self._world.send(rank, question)
        return [json.loads(self._world.receive(rank)) for rank in self._world.control]

    def close(self) -> None:
        """End all ranks in order; also done when this object is forgotten, and when the program ends."""
        self._close()

    def _check_idle(self) -> None:
        """Answers would be taken for results."""
        self._check()
        if self._own_results:
            raise RuntimeError(f"{len(self._own_results)} plans are in flight; collect them before asking ranks")

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
        if self._world.failure is None:
            self._world.fail(error)
        assert self._world.failure is not None
        return RankError(self._world.failure) if isinstance(error, RankError) else error


def _close_in(process_id: int, world: World) -> None:
    """A forked child has copies of everything, and must not end what is its parent's."""
    if os.getpid() == process_id:
        world.close(_END)


def _ledger_rows(worker: Worker) -> list[LedgerRow]:
    return [row for group in worker.groups for row in group.ledger_rows()]


def _ledger_data(worker: Worker) -> list[dict[str, Any]]:
    return [vars(row) | {"phase": row.phase.value} for row in _ledger_rows(worker)]


def _as_ledger_row(data: dict[str, Any]) -> LedgerRow:
    return LedgerRow(**(data | {"phase": Phase(data["phase"])}))


def agree(world: World, loaded: LoadedRank) -> list[RankReport]:
    """Rank 0: hear what every rank has loaded, rank 0 first."""
    reports = [RankReport.of(loaded)]
    for rank in world.control:
        reports.append(RankReport(**json.loads(world.receive(rank))))
    return reports


def announce(world: World, agreement: Mapping[str, Any]) -> None:
    """Rank 0: tell every rank what was agreed on, the arguments of `LoadedRank.make_worker`."""
    for rank in world.control:
        world.send(rank, json.dumps(agreement).encode())


def follow(world: World, loaded: LoadedRank) -> None:
    """Another rank: report, agree, and then run plans until rank 0 ends it.

    Raises:
        RankError: another rank was lost.
    """
    world.send(0, json.dumps(vars(RankReport.of(loaded))).encode())
    agreement = json.loads(world.receive(0))
    eos_token_ids = frozenset(agreement.pop("eos_token_ids"))
    worker = loaded.make_worker(**agreement, eos_token_ids=eos_token_ids)
    must_report = world.place.reports
    while True:
        message = world.receive(0)
        kind, content = message[:1], message[1:]
        if kind == _PLAN:
            result = worker.execute(decode_plan(content))
            if must_report:
                world.send(0, encode_result(result))
        elif kind == _LEDGER:
            world.send(0, json.dumps(_ledger_data(worker)).encode())
        elif kind == _START_TRACE:
            worker.start_trace()
            world.send(0, b"null")
        elif kind == _TAKE_TRACE:
            world.send(0, json.dumps(worker.take_trace(str(world.place)).to_data()).encode())
        elif kind == _CLOCK:
            world.send(0, json.dumps([host_id(), time.monotonic_ns()]).encode())
        elif kind == _DIFFERENCES:
            world.send(0, json.dumps(worker.exchange_differences()).encode())
        else:
            worker.check_exchanges()
            assert kind == _END, f"unknown message {kind!r}"
            return
