"""A sweep over the load: throughput, goodput and latencies. Needs matplotlib, an optional dependency."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from headrace.bench.serve.arrivals import ClosedLoop
from headrace.bench.serve.metrics import Goodput
from headrace.bench.serve.session import LevelResult

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def plot(results: Sequence[LevelResult], limits: Goodput | None, file: Path) -> None:
    """A panel each for tokens, requests, time to first token and time per output token, against the load.

    limits: drawn beside the latencies; goodput then stands beside the requests.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullLocator

    loads = [_load(result) for result in results]
    is_closed = isinstance(results[0].arrivals, ClosedLoop)
    figure = Figure(figsize=(15, 3.6), layout="constrained")
    tokens, requests, ttft, tpot = figure.subplots(1, 4)
    tokens.plot(loads, [r.metrics.output_tokens_per_s for r in results], marker=".")
    tokens.set(ylabel="output tokens/s", ylim=(0, None))
    requests.plot(loads, [r.metrics.requests_per_s for r in results], marker=".", label="completed")
    if limits is not None:
        goodput = [r.metrics.goodput_per_s for r in results]
        requests.plot(loads, goodput, marker="o", fillstyle="none", linestyle="--", label="within limits")
    requests.set(ylabel="requests/s", ylim=(0, None))
    requests.legend()
    _plot_latency(ttft, loads, results, "ttft", None if limits is None else limits.ttft_s)
    _plot_latency(tpot, loads, results, "tpot", None if limits is None else limits.tpot_s)
    for panel in (tokens, requests, ttft, tpot):
        panel.set(xlabel="requests at once" if is_closed else "requests/s offered", xscale="log")
        panel.set_xticks(loads, [f"{load:g}" for load in loads], minor=False)
        panel.xaxis.set_minor_locator(NullLocator())
    figure.savefig(file)


def _plot_latency(
    panel: "Axes", loads: Sequence[float], results: Sequence[LevelResult], name: str, limit_s: float | None
) -> None:
    """Logarithmic: beyond saturation a queue grows for as long as the load goes on."""
    from matplotlib.ticker import LogLocator, NullLocator

    found = [(load, d) for load, r in zip(loads, results, strict=True) if (d := getattr(r.metrics, name)) is not None]
    is_empty = True
    for percentile in (50, 99):
        # Tokens that all came in one read took no time at all, and have no place on the scale.
        points = [(load, ms) for load, d in found if (ms := d.percentiles[percentile] * 1e3) > 0]
        panel.plot([load for load, _ in points], [ms for _, ms in points], marker=".", label=f"p{percentile}")
        is_empty &= not points
    if limit_s is not None:
        panel.axhline(limit_s * 1e3, linestyle=":", color="gray", label="limit")
    panel.set(ylabel=f"{name.upper()}, ms")
    panel.legend()
    if is_empty:
        return
    panel.set(yscale="log")
    panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    panel.yaxis.set_minor_locator(NullLocator())
    panel.yaxis.set_major_formatter("{x:g}")


def _load(result: LevelResult) -> float:
    arrivals = result.arrivals
    return arrivals.concurrency if isinstance(arrivals, ClosedLoop) else arrivals.rate_per_s
