"""What a load's records say of the server: latencies, throughput, goodput."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby
from operator import itemgetter

import numpy as np

from headrace.bench.serve.records import FailureKind, RequestRecord

PERCENTILES = (50, 90, 95, 99)


@dataclass(frozen=True)
class Distribution:
    """Seconds. Percentiles are interpolated linearly between the values, as numpy does it."""

    count: int
    mean: float
    percentiles: dict[int, float]
    maximum: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Distribution | None":
        """None without any values."""
        if not values:
            return None
        found = np.percentile(values, PERCENTILES)
        percentiles = {p: float(value) for p, value in zip(PERCENTILES, found, strict=True)}
        return cls(len(values), float(np.mean(values)), percentiles, max(values))


@dataclass(frozen=True, kw_only=True)
class Goodput:
    """Requests that kept every limit. Seconds; None is no limit.

    A request without a figure (a single token has no time per output token) keeps its limit; one that failed
    keeps none.
    """

    ttft_s: float | None = None
    tpot_s: float | None = None
    e2el_s: float | None = None

    def is_kept(self, record: RequestRecord) -> bool:
        figures = ((self.ttft_s, record.ttft_s), (self.tpot_s, record.tpot_s), (self.e2el_s, record.e2e_s))
        kept = all(limit is None or value is None or value <= limit for limit, value in figures)
        return record.is_completed and kept


@dataclass(frozen=True)
class FailureCount:
    kind: FailureKind
    status: int | None
    reason: str
    count: int


@dataclass(frozen=True, kw_only=True)
class LoadMetrics:
    """Of all requests of a load that ended; those that failed count in `failures` and in `peak_concurrency` only.

    duration_s: from the first start to the last end. Throughputs are sums over `duration_s`, and tokens are the
    server's counts where it has sent some (`has_server_counts`: for every completed request). decode_tokens_per_s: see
    there. peak_concurrency: requests under way at once. goodput_per_s: None where no limit was given.
    """

    num_requests: int
    num_completed: int
    failures: tuple[FailureCount, ...]
    num_reconnected: int
    duration_s: float
    prompt_tokens: int
    cached_tokens: int | None
    output_tokens: int
    num_short_outputs: int
    """Completed with fewer tokens than asked for."""
    has_server_counts: bool
    requests_per_s: float
    prompt_tokens_per_s: float
    output_tokens_per_s: float
    decode_concurrency: int
    decode_tokens_per_s: float | None
    tokens_per_chunk: float | None
    peak_concurrency: int
    ttft: Distribution | None
    tpot: Distribution | None
    itl: Distribution | None
    e2e: Distribution | None
    num_good: int | None
    goodput_per_s: float | None

    @property
    def num_failed(self) -> int:
        return self.num_requests - self.num_completed

    @property
    def good_share(self) -> float | None:
        """Of all requests, failed ones included."""
        return None if self.num_good is None or not self.num_requests else self.num_good / self.num_requests


def summarize(records: Sequence[RequestRecord], goodput: Goodput | None = None) -> LoadMetrics:
    """
    Source: the definitions of vLLM's `bench serve`, but that a chat's first chunk, which names the role, is no token.
    """
    done = [record for record in records if record.is_completed]
    duration_s = _duration_s(records)
    prompt_tokens = sum(record.prompt_tokens or record.asked_prompt_tokens or 0 for record in done)
    output_tokens = sum(record.num_output_tokens for record in done)
    cached = [record.cached_tokens for record in done if record.cached_tokens is not None]
    num_chunks = sum(len(record.chunk_s) for record in done)
    decode_concurrency, decode_tokens_per_s = full_decode(done)
    num_good = None if goodput is None else sum(goodput.is_kept(record) for record in records)
    return LoadMetrics(
        num_requests=len(records),
        num_completed=len(done),
        failures=tuple(_failures(records)),
        num_reconnected=sum(record.is_reconnected for record in records),
        duration_s=duration_s,
        prompt_tokens=prompt_tokens,
        cached_tokens=sum(cached) if cached else None,
        output_tokens=output_tokens,
        num_short_outputs=sum(record.num_output_tokens < record.asked_output_tokens for record in done),
        has_server_counts=all(record.output_tokens is not None for record in done),
        requests_per_s=_per_s(len(done), duration_s),
        prompt_tokens_per_s=_per_s(prompt_tokens, duration_s),
        output_tokens_per_s=_per_s(output_tokens, duration_s),
        decode_concurrency=decode_concurrency,
        decode_tokens_per_s=decode_tokens_per_s,
        tokens_per_chunk=output_tokens / num_chunks if num_chunks else None,
        peak_concurrency=_peak_concurrency(records),
        ttft=_distribution(record.ttft_s for record in done),
        tpot=_distribution(record.tpot_s for record in done),
        itl=_distribution(interval for record in done for interval in record.itl_s),
        e2e=_distribution(record.e2e_s for record in done),
        num_good=num_good,
        goodput_per_s=None if num_good is None else _per_s(num_good, duration_s),
    )


def full_decode(done: Iterable[RequestRecord]) -> tuple[int, float | None]:
    """How many requests ever decoded at once, and their tokens per second for as long as so many did.

    A request decodes from its first chunk to its last; a chunk's tokens count in the time that ends with it, and a
    request's tokens after the first are spread evenly over its chunks. While all clients of a closed loop decode, none
    waits for its prompt, so this is the aggregate rate of decoding alone. None where it never took any time.
    """
    decoding = [record for record in done if record.tpot_s is not None]
    changes = sorted((change for record in decoding for change in _decode_changes(record)), key=itemgetter(0))
    seconds: dict[int, float] = defaultdict(float)
    tokens: dict[int, float] = defaultdict(float)
    level, before_s = 0, 0.0
    for now_s, group in groupby(changes, key=itemgetter(0)):
        together = list(group)
        seconds[level] += now_s - before_s
        tokens[level] += sum(num_tokens for _, _, num_tokens in together)
        level += sum(step for _, step, _ in together)
        before_s = now_s
    peak = max((n for n in seconds if n and seconds[n]), default=0)
    return peak, tokens[peak] / seconds[peak] if peak else None


def _decode_changes(record: RequestRecord) -> Iterable[tuple[float, int, float]]:
    """(time, change of the number of requests that decode, tokens that came)."""
    first_s, *later_s = record.chunk_s
    num_tokens = (record.num_output_tokens - 1) / len(later_s)
    yield first_s, 1, 0.0
    for now_s in later_s[:-1]:
        yield now_s, 0, num_tokens
    yield later_s[-1], -1, num_tokens


def _peak_concurrency(records: Iterable[RequestRecord]) -> int:
    ended = [record for record in records if record.ended_s is not None]
    # At the same instant an end comes before a start.
    steps = sorted(step for r in ended for step in ((r.started_s, 1), (r.ended_s or 0.0, -1)))
    return max(accumulate(step for _, step in steps), default=0)


def _duration_s(records: Sequence[RequestRecord]) -> float:
    ends = [record.ended_s for record in records if record.ended_s is not None]
    return max(ends) - min(record.started_s for record in records) if ends else 0.0


def _failures(records: Sequence[RequestRecord]) -> Iterable[FailureCount]:
    found = Counter(record.failure for record in records if record.failure is not None)
    for failure, count in found.most_common():
        yield FailureCount(failure.kind, failure.status, failure.reason, count)


def _distribution(values: Iterable[float | None]) -> Distribution | None:
    return Distribution.of([value for value in values if value is not None])


def _per_s(amount: float, seconds: float) -> float:
    return amount / seconds if seconds > 0 else 0.0
