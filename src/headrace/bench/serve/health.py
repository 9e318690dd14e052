"""Whether the generator itself kept up, and what else must be said beside the figures."""

from collections.abc import Iterator
from dataclasses import dataclass

from headrace.bench.serve.arrivals import ClosedLoop
from headrace.bench.serve.load import LoadRun
from headrace.bench.serve.metrics import Distribution, LoadMetrics

MAX_LATENESS_S = 0.005
MAX_TICK_LAG_S = 0.010
MAX_PROMPT_DEVIATION = 0.02


@dataclass(frozen=True)
class GeneratorHealth:
    """lateness: of sending, against the schedule; tick_lag: of the generator's timers, and so of its readings of the
    clock; cpu_share: of one CPU, which a server on the same machine did not have."""

    lateness: Distribution | None
    tick_lag: Distribution | None
    cpu_share: float

    @classmethod
    def of(cls, run: LoadRun) -> "GeneratorHealth":
        return cls(
            lateness=Distribution.of([record.lateness_s for record in run.records]),
            tick_lag=Distribution.of(run.tick_lag_s),
            cpu_share=run.cpu_s / run.wall_s if run.wall_s else 0.0,
        )


def remarks(run: LoadRun, metrics: LoadMetrics, arrivals: object) -> Iterator[str]:
    """What a reader of the figures must know; nothing where all went as asked."""
    yield from _failures(run, metrics)
    yield from _generator(GeneratorHealth.of(run), arrivals)
    yield from _tokens(run, metrics)


def _failures(run: LoadRun, metrics: LoadMetrics) -> Iterator[str]:
    if run.was_stopped:
        yield f"stopped early: {len(run.under_way)} requests were cut off and count nowhere"
    if metrics.num_failed:
        yield f"{metrics.num_failed} of {metrics.num_requests} requests failed; the figures are of the others"
    if metrics.num_reconnected:
        yield f"{metrics.num_reconnected} requests found their kept connection closed, and were sent again on a new one"


def _generator(health: GeneratorHealth, arrivals: object) -> Iterator[str]:
    late, lag = health.lateness, health.tick_lag
    if late is not None and late.percentiles[99] > MAX_LATENESS_S and not isinstance(arrivals, ClosedLoop):
        yield (
            f"the generator did not keep its schedule: one request in a hundred was sent "
            f"{late.percentiles[99] * 1e3:.0f} ms late or more, one {late.maximum * 1e3:.0f} ms"
        )
    if lag is not None and lag.percentiles[99] > MAX_TICK_LAG_S:
        yield (
            f"the generator's clock readings came up to {lag.percentiles[99] * 1e3:.0f} ms late (99th percentile): "
            "it had too little of a CPU"
        )


def _tokens(run: LoadRun, metrics: LoadMetrics) -> Iterator[str]:
    if metrics.num_completed and not metrics.has_server_counts:
        yield "the server did not count its tokens: a chunk of an answer is taken for one"
    if metrics.num_short_outputs:
        yield f"{metrics.num_short_outputs} answers were shorter than asked for; --ignore-eos asks for full ones"
    pairs = [
        (record.prompt_tokens, record.asked_prompt_tokens)
        for record in run.records
        if record.prompt_tokens is not None and record.asked_prompt_tokens is not None
    ]
    counted, asked = sum(pair[0] for pair in pairs), sum(pair[1] for pair in pairs)
    if asked and abs(counted - asked) > MAX_PROMPT_DEVIATION * asked:
        yield (
            f"prompts have {counted / len(pairs):.1f} tokens on average by the server's count; "
            f"{asked / len(pairs):.1f} were asked for"
        )
    if metrics.cached_tokens:
        yield f"{metrics.cached_tokens / metrics.prompt_tokens:.1%} of the prompt tokens came from a prefix cache"
