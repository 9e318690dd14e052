"""What a load on a server found, as JSON and as tables."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

from headrace.bench.serve.arrivals import Arrivals, ClosedLoop
from headrace.bench.serve.health import GeneratorHealth, remarks
from headrace.bench.serve.metrics import PERCENTILES, Distribution, LoadMetrics
from headrace.bench.serve.session import LevelResult, Session, arrivals_text, best_level
from headrace.cli.environment import machine, versions
from headrace.cli.terminal import aligned, format_ms, format_rate

_LATENCIES = {
    "ttft": "time to first token",
    "tpot": "time per output token",
    "itl": "between chunks",
    "e2e": "whole answer",
}


def to_json(session: Session, results: Sequence[LevelResult]) -> dict[str, Any]:
    """One load's figures at the top level; those of a sweep as a list under "levels"."""
    bench = session.bench
    levels = [_level_to_json(result) for result in results]
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "base_url": str(bench.target.address),
        "endpoint": bench.target.route.value,
        "model": session.model,
        "request_mix": None if bench.workload.samples else str(bench.workload.mix),
        "num_prompts_of_file": len(bench.workload.samples) or None,
        "prompts_are": _prompts_are(session),
        "shared_prefix_tokens": bench.workload.shared_prefix_tokens,
        "extra_body": dict(bench.target.extra_body),
        "seed": bench.workload.seed,
        "num_requests_asked": bench.load.num_requests,
        "duration_s_asked": bench.load.duration_s,
        "warmup": bench.load.warmup,
        "goodput_limits_s": None if bench.goodput is None else asdict(bench.goodput),
        "machine": machine(),
        "versions": versions(),
        **(
            levels[0]
            if bench.sweep is None
            else {"sweep": bench.sweep.over.value, "best_level": best_level(results), "levels": levels}
        ),
    }


def table(session: Session, result: LevelResult) -> list[str]:
    """Latencies, then throughput and what it stands on."""
    metrics = result.metrics
    rows = [("", "mean", *(f"p{p}" for p in PERCENTILES), "max")]
    for name, label in _LATENCIES.items():
        rows.append((label, *_cells(getattr(metrics, name))))
    return [*aligned(rows), "", *aligned(list(_facts(session, result)), num_left=2), *_remark_lines([result])]


def levels_table(session: Session, results: Sequence[LevelResult]) -> list[str]:
    """A line for each level of a sweep."""
    has_limits = session.bench.goodput is not None
    head = ["", "done", "failed", "requests/s", "output tokens/s", "TTFT p50", "p99", "TPOT p50", "p99"]
    rows = [[*head, *(["goodput", "within limits"] if has_limits else [])]]
    for result in results:
        metrics = result.metrics
        cells = [str(metrics.num_completed), str(metrics.num_failed)]
        cells += [format_rate(metrics.requests_per_s), format_rate(metrics.output_tokens_per_s)]
        cells += [format_ms(_at(d, p)) for d in (metrics.ttft, metrics.tpot) for p in (50, 99)]
        good = [f"{format_rate(metrics.goodput_per_s)}/s", f"{metrics.good_share or 0:.0%}"] if has_limits else []
        rows.append([arrivals_text(result.arrivals), *cells, *good])
    facts = aligned([("most", _most(results)), *_target_facts(session)], num_left=2)
    return [*aligned(rows), "", *facts, *_failure_lines(results), *_remark_lines(results)]


def request_lines(results: Sequence[LevelResult]) -> Iterator[str]:
    """Every request that ended, as a JSON object; times in seconds from its load's start."""
    for index, result in enumerate(results):
        for record in result.run.records:
            start_s = result.run.start_s
            failure = record.failure
            yield json.dumps(
                {
                    "level": index,
                    "scheduled_s": record.scheduled_s - start_s,
                    "started_s": record.started_s - start_s,
                    "chunk_s": [time_s - start_s for time_s in record.chunk_s],
                    "ended_s": None if record.ended_s is None else record.ended_s - start_s,
                    "asked_prompt_tokens": record.asked_prompt_tokens,
                    "asked_output_tokens": record.asked_output_tokens,
                    "prompt_tokens": record.prompt_tokens,
                    "cached_tokens": record.cached_tokens,
                    "output_tokens": record.output_tokens,
                    "finish_reason": record.finish_reason,
                    "failure": failure
                    and {"kind": failure.kind.value, "status": failure.status, "reason": failure.reason},
                }
            )


def _level_to_json(result: LevelResult) -> dict[str, Any]:
    metrics, health = result.metrics, GeneratorHealth.of(result.run)
    figures = {name: value for name, value in asdict(metrics).items() if name not in (*_LATENCIES, "failures")}
    return {
        "arrivals": _arrivals_to_json(result.arrivals),
        **figures,
        "num_failed": metrics.num_failed,
        "good_share": metrics.good_share,
        **{f"{name}_ms": _milliseconds(getattr(metrics, name)) for name in _LATENCIES},
        "failures": [asdict(failure) | {"kind": failure.kind.value} for failure in metrics.failures],
        "generator": {
            "lateness_ms": _milliseconds(health.lateness),
            "tick_lag_ms": _milliseconds(health.tick_lag),
            "cpu_share": health.cpu_share,
        },
        "was_stopped": result.run.was_stopped,
        "num_cut_off": len(result.run.under_way),
        "remarks": list(remarks(result.run, metrics, result.arrivals)),
    }


def _arrivals_to_json(arrivals: Arrivals) -> dict[str, Any]:
    fields = asdict(arrivals)
    if isinstance(arrivals, ClosedLoop):
        return {"kind": "closed loop", **fields}
    rate = fields.pop("rate_per_s")
    return {"kind": "open loop", "rate_per_s": None if rate == float("inf") else rate, **fields}


def _milliseconds(distribution: Distribution | None) -> dict[str, float] | None:
    if distribution is None:
        return None
    percentiles = {f"p{p}": value * 1e3 for p, value in distribution.percentiles.items()}
    return {"mean": distribution.mean * 1e3, **percentiles, "max": distribution.maximum * 1e3}


def _cells(distribution: Distribution | None) -> list[str]:
    if distribution is None:
        return ["-"] * (len(PERCENTILES) + 2)
    values = [distribution.mean, *distribution.percentiles.values(), distribution.maximum]
    return [format_ms(value) for value in values]


def _at(distribution: Distribution | None, percentile: int) -> float | None:
    return None if distribution is None else distribution.percentiles[percentile]


def _facts(session: Session, result: LevelResult) -> Iterator[tuple[str, str]]:
    metrics, health = result.metrics, GeneratorHealth.of(result.run)
    yield "requests", f"{metrics.num_completed} done, {metrics.num_failed} failed, in {metrics.duration_s:.2f} s"
    yield from _failure_facts(metrics)
    yield (
        "throughput",
        (
            f"{format_rate(metrics.requests_per_s)} requests/s, "
            f"{format_rate(metrics.output_tokens_per_s)} output tokens/s, "
            f"{format_rate(metrics.prompt_tokens_per_s)} prompt tokens/s"
        ),
    )
    if metrics.decode_tokens_per_s is not None and isinstance(result.arrivals, ClosedLoop):
        rate = format_rate(metrics.decode_tokens_per_s)
        yield "decode alone", f"{rate} tokens/s while {metrics.decode_concurrency} answers were being written"
    if metrics.goodput_per_s is not None:
        yield "goodput", f"{format_rate(metrics.goodput_per_s)} requests/s, {metrics.good_share or 0:.1%} within limits"
    yield "tokens", f"{metrics.prompt_tokens:,} prompt, {metrics.output_tokens:,} output"
    yield "load", f"{arrivals_text(result.arrivals)}, at most {metrics.peak_concurrency} requests at once"
    yield from _target_facts(session)
    if health.lateness is not None:
        late = health.lateness.percentiles[99]
        yield "generator", f"{health.cpu_share:.1%} of a CPU, sends {format_ms(late)} late at p99"


def _most(results: Sequence[LevelResult]) -> str:
    best = results[best_level(results)]
    metrics = best.metrics
    if metrics.goodput_per_s is not None:
        return f"{format_rate(metrics.goodput_per_s)} requests/s within limits, at {arrivals_text(best.arrivals)}"
    return f"{format_rate(metrics.output_tokens_per_s)} output tokens/s, at {arrivals_text(best.arrivals)}"


def _target_facts(session: Session) -> Iterator[tuple[str, str]]:
    target, workload = session.bench.target, session.bench.workload
    yield "server", f"{target.address}, {target.route.value}, model {session.model}"
    what = f"{len(workload.samples)} prompts of a file" if workload.samples else f"mix {workload.mix}"
    yield "prompts", f"{what}, {_prompts_are(session)}, seed {workload.seed}"


def _prompts_are(session: Session) -> str:
    if session.bench.workload.samples:
        return "as the file has them"
    if session.bench.workload.vocab_size is not None:
        return "random token ids"
    return "random words, " + ("fitted with the server's tokenizer" if session.counts_by_server else "one a token")


def _failure_facts(metrics: LoadMetrics) -> Iterator[tuple[str, str]]:
    for failure in metrics.failures:
        status = "" if failure.status is None else f" {failure.status}"
        yield "failed", f"{failure.count} x {failure.kind.value}{status}: {failure.reason}"


def _failure_lines(results: Sequence[LevelResult]) -> Iterator[str]:
    for result in results:
        for _, text in _failure_facts(result.metrics):
            yield f"failed at {arrivals_text(result.arrivals)}: {text}"


def _remark_lines(results: Sequence[LevelResult]) -> Iterator[str]:
    for result in results:
        place = f"{arrivals_text(result.arrivals)}: " if len(results) > 1 else ""
        for remark in remarks(result.run, result.metrics, result.arrivals):
            yield f"note: {place}{remark}"
