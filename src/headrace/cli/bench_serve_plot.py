"""A sweep over the load: throughput, goodput and latencies. Needs matplotlib, an optional dependency."""

from collections.abc import Sequence
from pathlib import Path

from headrace.bench.serve.arrivals import ClosedLoop
from headrace.bench.serve.session import LevelResult


def plot(results: Sequence[LevelResult], file: Path) -> None:
    """Throughput, time to first token and time per output token against the load, one panel each."""
    from matplotlib.figure import Figure

    is_closed = isinstance(results[0].arrivals, ClosedLoop)
    loads = [_load(result) for result in results]
    figure = Figure(figsize=(13, 3.8), layout="constrained")
    panels = figure.subplots(1, 3)
    panels[0].plot(loads, [r.metrics.output_tokens_per_s for r in results], marker=".", label="output tokens/s")
    panels[0].set(ylabel="output tokens/s", ylim=(0, None))
    if results[0].metrics.goodput_per_s is not None:
        beside = panels[0].twinx()
        requests = [r.metrics.requests_per_s for r in results]
        beside.plot(loads, requests, marker=".", color="gray", linestyle="--", label="requests/s")
        beside.plot(loads, [r.metrics.goodput_per_s for r in results], marker=".", color="tab:green", label="goodput")
        beside.set(ylabel="requests/s", ylim=(0, None))
        beside.legend(loc="lower right")
    for panel, name in zip(panels[1:], ("ttft", "tpot"), strict=True):
        found = [(load, d) for load, r in zip(loads, results, strict=True) if (d := getattr(r.metrics, name))]
        for percentile in (50, 99):
            values = [d.percentiles[percentile] * 1e3 for _, d in found]
            panel.plot([load for load, _ in found], values, marker=".", label=f"p{percentile}")
        panel.set(ylabel=f"{name.upper()}, ms", ylim=(0, None))
        panel.legend()
    for panel in panels:
        panel.set(xlabel="requests at once" if is_closed else "requests/s offered", xscale="log")
        panel.set_xticks(loads, [f"{load:g}" for load in loads], minor=False)
        panel.minorticks_off()
    figure.savefig(file)


def _load(result: LevelResult) -> float:
    arrivals = result.arrivals
    return arrivals.concurrency if isinstance(arrivals, ClosedLoop) else arrivals.rate_per_s
