"""One run from the first question to the server to the last figure."""

import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, takewhile

import numpy as np

from headrace.bench.serve.arrivals import Arrivals, ClosedLoop, OpenLoop
from headrace.bench.serve.endpoint import Endpoint
from headrace.bench.serve.http_client import HttpClient
from headrace.bench.serve.load import LoadGenerator, LoadRun
from headrace.bench.serve.metrics import LoadMetrics, summarize
from headrace.bench.serve.prompts import CountTokens, TextPrompts, TokenIdPrompts
from headrace.bench.serve.requests import FileRequests, ReadyRequest, Requests, RequestWriter, SyntheticRequests
from headrace.bench.serve.seeds import draws
from headrace.bench.serve.settings import MAX_AUTO_LEVELS, ServeBench
from headrace.errors import EndpointError

_MIN_GROWTH = 1.05
"""A sweep without limits ends where twice the load brings less than 5 % more tokens per second."""


@dataclass(frozen=True, kw_only=True)
class LevelResult:
    arrivals: Arrivals
    run: LoadRun
    metrics: LoadMetrics


class Session:
    """Runs what a `ServeBench` asks for. `model` is known once `results` has begun."""

    def __init__(self, bench: ServeBench, say: Callable[[str], None] = lambda _: None) -> None:
        target = bench.target
        self.bench = bench
        self.model = target.model or ""
        self.counts_by_server = False
        """Prompts of words were fitted by the server's tokenizer."""
        self.arrivals = bench.load.arrivals
        """Of the load under way, or the last one."""
        self.client = HttpClient(
            address=target.address, headers=target.headers, timeout_s=target.timeout_s, verify=target.verify
        )
        self.generator = LoadGenerator(self.client)
        self._say = say

    async def results(self) -> AsyncGenerator[LevelResult, None]:
        """Of each load as it ends; one that was stopped is the last.

        Raises:
            EndpointError: the server cannot be reached or used.
        """
        try:
            self._say(f"asking {self.client.address}")
            endpoint = Endpoint(self.client)
            self.model = self.model or await endpoint.first_model()
            requests = await self._requests(endpoint)
            await self._warm_up(requests)
            async for result in self._levels(requests):
                yield result
        finally:
            self.client.close()

    async def _requests(self, endpoint: Endpoint) -> Requests:
        workload, target = self.bench.workload, self.bench.target
        writer = RequestWriter(client=self.client, route=target.route, model=self.model, extra_body=target.extra_body)
        if workload.samples:
            return FileRequests(writer=writer, samples=list(workload.samples), mix=workload.mix)
        rng = self._rng("shared prefix")
        if workload.vocab_size is not None:
            ids = TokenIdPrompts.make(workload.vocab_size, workload.shared_prefix_tokens, rng)
            return SyntheticRequests(writer=writer, mix=workload.mix, prompts=ids)
        count = await endpoint.find_tokenizer(self.model)
        self.counts_by_server = count is not None
        words_per_token = 1.0 if count is None else await _words_per_token(count, rng)
        words = TextPrompts.make(workload.shared_prefix_tokens, words_per_token, rng)
        return SyntheticRequests(writer=writer, mix=workload.mix, prompts=words, count=count)

    async def _warm_up(self, requests: Requests) -> None:
        num_requests = self.bench.load.warmup
        if not num_requests:
            return
        self._say("warming up")
        run = await self.generator.warm_up(requests.generate(self._rng("warm-up")), num_requests)
        failure = run.records[-1].failure if run.records else None
        if failure is not None:
            status = f" {failure.status}" if failure.status else ""
            raise EndpointError(
                f"the first request to {self.client.address} failed: {failure.kind.value}{status}: {failure.reason}"
            )

    async def _levels(self, requests: Requests) -> AsyncIterator[LevelResult]:
        sweep, given = self.bench.sweep, self.bench.load.arrivals
        if sweep is None:
            yield await self._level(requests, given, 0)
            return
        levels = iter(sweep.levels) if sweep.levels else (2.0**i for i in range(MAX_AUTO_LEVELS))
        before: LevelResult | None = None
        for index, level in enumerate(levels):
            result = await self._level(requests, sweep.arrivals(level, given), index)
            yield result
            if result.run.was_stopped or (not sweep.levels and before is not None and is_saturated(before, result)):
                return
            before = result

    async def _level(self, requests: Requests, arrivals: Arrivals, index: int) -> LevelResult:
        load, self.arrivals = self.bench.load, arrivals
        source = requests.generate(self._rng("requests", index))
        if isinstance(arrivals, OpenLoop):
            times_s = _times_s(arrivals, load.num_requests, load.duration_s, self._rng("arrivals", index))
            prepared = await self._prepare(source, len(times_s))
            run = await self.generator.open_loop(prepared, times_s)
        else:
            run = await self._closed_loop(source, requests, arrivals, index)
        return LevelResult(arrivals=arrivals, run=run, metrics=summarize(run.records, self.bench.goodput))

    async def _closed_loop(
        self, source: AsyncIterator[ReadyRequest], requests: Requests, arrivals: ClosedLoop, index: int
    ) -> LoadRun:
        load = self.bench.load
        if load.num_requests is not None:
            source = await self._prepare(source, load.num_requests)
        elif isinstance(requests, SyntheticRequests):
            # Nobody knows how many there will be, and questions about tokens must not mix with the load.
            source = requests.without_counting().generate(self._rng("requests", index))
        return await self.generator.closed_loop(
            source, arrivals.concurrency, num_requests=load.num_requests, duration_s=load.duration_s
        )

    async def _prepare(self, source: AsyncIterator[ReadyRequest], num_requests: int) -> AsyncIterator[ReadyRequest]:
        """Make them all before the clock runs."""
        self._say(f"preparing {num_requests} requests")
        ready: list[ReadyRequest] = []
        while len(ready) < num_requests and not self.generator.is_stopped:
            ready.append(await anext(source))
        return _replay(ready)

    def _rng(self, purpose: str, index: int = 0) -> np.random.Generator:
        return draws(self.bench.workload.seed, purpose, index)


def is_saturated(before: LevelResult, after: LevelResult) -> bool:
    """Whether more load is of no use: less goodput than before where there are limits, hardly more tokens else."""
    if before.metrics.goodput_per_s is not None and after.metrics.goodput_per_s is not None:
        return after.metrics.goodput_per_s < before.metrics.goodput_per_s
    return after.metrics.output_tokens_per_s < _MIN_GROWTH * before.metrics.output_tokens_per_s


def best_level(results: Sequence[LevelResult]) -> int:
    """The index of the level with the most goodput, or, without limits, with the most output tokens per second."""
    metrics = [result.metrics for result in results]
    figures = [m.output_tokens_per_s if m.goodput_per_s is None else m.goodput_per_s for m in metrics]
    return max(range(len(figures)), key=figures.__getitem__)


def arrivals_text(arrivals: Arrivals) -> str:
    if isinstance(arrivals, ClosedLoop):
        return f"concurrency {arrivals.concurrency}"
    return f"rate {arrivals.rate_per_s:g}"


def progress_text(run: LoadRun) -> str:
    """What a load under way has done, on one line."""
    elapsed_s = time.perf_counter() - run.start_s
    completed = [record for record in run.records if record.is_completed]
    failed = len(run.records) - len(completed)
    tokens = sum(r.num_output_tokens for r in completed) + sum(len(r.chunk_s) for r in run.under_way)
    return (
        f"{elapsed_s:.0f} s: {len(completed)} done, {len(run.under_way)} running, {failed} failed, "
        f"{tokens / max(elapsed_s, 1e-9):.1f} output tokens/s"
    )


async def _words_per_token(count: CountTokens, rng: np.random.Generator) -> float:
    num_words = 256
    text = await TextPrompts().next(num_words, rng, None)
    return num_words / max(1, await count(text))


async def _replay(ready: list[ReadyRequest]) -> AsyncIterator[ReadyRequest]:
    for request in ready:
        yield request


def _times_s(
    arrivals: OpenLoop, num_requests: int | None, duration_s: float | None, rng: np.random.Generator
) -> list[float]:
    times: Iterator[float] = arrivals.times_s(rng)
    if duration_s is not None:
        times = takewhile(lambda time_s: time_s < duration_s, times)
    return list(islice(times, num_requests))
