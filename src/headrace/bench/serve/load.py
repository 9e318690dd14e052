"""Sending requests when they are due, or when an answer makes room, and waiting for all of them."""

import asyncio
import time
from collections.abc import AsyncIterator, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any

from headrace.bench.serve.chunks import StreamedAnswer
from headrace.bench.serve.http_client import ConnectFailed, HttpClient
from headrace.bench.serve.records import Failure, FailureKind, RequestRecord
from headrace.bench.serve.requests import ReadyRequest

_TICK_S = 0.05


@dataclass(kw_only=True)
class LoadRun:
    """All that happened, while it happens and after. Times of records are of time.perf_counter.

    records: of answers that have ended, well or not, in the order in which they did. under_way: of the others; those
    that were cut off when `was_stopped` stay there. tick_lag_s: how much later than asked for a timer of the generator
    fired, sampled all along: how stale its readings of the clock may be. cpu_s: of the generator's process.
    """

    records: list[RequestRecord] = field(default_factory=list)
    under_way: set[RequestRecord] = field(default_factory=set)
    tick_lag_s: list[float] = field(default_factory=list)
    start_s: float = field(default_factory=time.perf_counter)
    cpu_s: float = 0.0
    wall_s: float = 0.0
    was_stopped: bool = False


class LoadGenerator:
    """Puts one load after another on a server; `stop` ends the one under way and all that would follow."""

    def __init__(self, client: HttpClient) -> None:
        self._client = client
        self._stopped = asyncio.Event()
        self.run = LoadRun()
        """The load under way, or the last one."""
        self.is_loading = False

    @property
    def is_stopped(self) -> bool:
        return self._stopped.is_set()

    def stop(self) -> None:
        self._stopped.set()

    async def warm_up(self, requests: AsyncIterator[ReadyRequest], num_requests: int) -> LoadRun:
        """One request after the other; the first failure ends it."""

        async def drive() -> None:
            for _ in range(num_requests):
                await self._send(await anext(requests), time.perf_counter())
                if self.run.records[-1].failure is not None:
                    return

        return await self._watch(drive())

    async def open_loop(self, requests: AsyncIterator[ReadyRequest], times_s: Sequence[float]) -> LoadRun:
        """A request at each of `times_s` after the start, whatever has become of those before."""

        async def drive() -> None:
            async with asyncio.TaskGroup() as tasks:
                for time_s in times_s:
                    request = await anext(requests)
                    due_s = self.run.start_s + time_s
                    if (wait_s := due_s - time.perf_counter()) > 0:
                        await asyncio.sleep(wait_s)
                    tasks.create_task(self._send(request, due_s))

        return await self._watch(drive())

    async def closed_loop(
        self,
        requests: AsyncIterator[ReadyRequest],
        concurrency: int,
        *,
        num_requests: int | None,
        duration_s: float | None,
    ) -> LoadRun:
        """`concurrency` clients until so many requests were sent, or for so long; what was sent is waited for."""
        num_sent = 0

        def may_send() -> bool:
            is_in_time = duration_s is None or time.perf_counter() - self.run.start_s < duration_s
            return is_in_time and (num_requests is None or num_sent < num_requests)

        async def client() -> None:
            nonlocal num_sent
            while may_send():
                num_sent += 1
                now_s = time.perf_counter()
                await self._send(await anext(requests), now_s)

        async def drive() -> None:
            async with asyncio.TaskGroup() as tasks:
                for _ in range(concurrency):
                    tasks.create_task(client())

        return await self._watch(drive())

    async def _watch(self, driving: Coroutine[Any, Any, None]) -> LoadRun:
        """Run a load to its end or until it is stopped, with a clock beside it."""
        run = self.run = LoadRun()
        if self.is_stopped:
            driving.close()
            run.was_stopped = True
            return run
        self.is_loading = True
        cpu_s = time.process_time()
        driver = asyncio.create_task(driving)
        ticker = asyncio.create_task(self._tick())
        stopped = asyncio.create_task(self._stopped.wait())
        try:
            await asyncio.wait({driver, stopped}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            run.was_stopped = not driver.done()
            for task in (driver, ticker, stopped):
                task.cancel()
            results = await asyncio.gather(driver, ticker, stopped, return_exceptions=True)
            self.is_loading = False
        run.wall_s = time.perf_counter() - run.start_s
        run.cpu_s = time.process_time() - cpu_s
        if isinstance(results[0], Exception):
            raise results[0]
        return run

    async def _send(self, request: ReadyRequest, scheduled_s: float) -> None:
        record = RequestRecord(
            scheduled_s=scheduled_s,
            started_s=time.perf_counter(),
            asked_prompt_tokens=request.prompt_tokens,
            asked_output_tokens=request.output_tokens,
        )
        run = self.run
        run.under_way.add(record)
        try:
            record.is_reconnected = await self._client.exchange(request.payload, StreamedAnswer(record))
        except ConnectFailed as error:
            record.ended_s = time.perf_counter()
            record.failure = Failure(FailureKind.CONNECT, str(error))
        run.under_way.discard(record)
        run.records.append(record)

    async def _tick(self) -> None:
        while True:
            asked_s = time.perf_counter() + _TICK_S
            await asyncio.sleep(_TICK_S)
            self.run.tick_lag_s.append(max(0.0, time.perf_counter() - asked_s))
