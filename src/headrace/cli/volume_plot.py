"""Bytes on all wires against prompt length and against number of ranks. Needs matplotlib, an optional dependency."""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from headrace.cli.volume_report import VolumeReport, literal
from headrace.costs.exchanges import Layout
from headrace.costs.steps import RequestShape
from headrace.costs.summary import wire_bytes_by_phase
from headrace.costs.volume import predict_request
from headrace.errors import ParallelismError

_PROMPT_TOKENS = tuple(2**power for power in range(4, 14))
_NUM_RANKS = (2, 4, 8, 16)

Curves = dict[str, dict[int, int]]
"""By name: bytes, by what is on the x axis."""


def plot(report: VolumeReport, file: Path) -> None:
    """Tensor and pipeline parallelism, each by the letter and by Headrace: over the length of the prompt, for as many
    ranks as the layout has (2 if it has one) and beside the layout itself if it is both, and over the number of ranks.
    Both axes are logarithmic."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.6), layout="constrained")
    by_length, by_ranks = figure.subplots(1, 2)
    num_ranks = max(2, report.layout.parallel.world_size)
    request = report.request
    by_length.set(
        title=f"{num_ranks} ranks, {request.output_tokens} generated tokens", xlabel="prompt tokens (each request)"
    )
    by_ranks.set(title=f"{request.prompt_tokens} prompt and {request.output_tokens} generated tokens", xlabel="ranks")
    for label, points in curves_by_length(report, num_ranks).items():
        by_length.plot(list(points), list(points.values()), _style(label), marker=".", label=label)
    for label, points in curves_by_ranks(report).items():
        by_ranks.plot(list(points), list(points.values()), _style(label), marker="o", label=label)
    figure.suptitle(f"{report.model_name}, {report.dtype}")
    for panel in (by_length, by_ranks):
        panel.set(xscale="log", yscale="log", ylabel="bytes on all wires")
        panel.legend()
    by_ranks.set_xticks(_NUM_RANKS, labels=list(map(str, _NUM_RANKS)))
    by_ranks.minorticks_off()
    figure.savefig(file)


def curves_by_length(report: VolumeReport, num_ranks: int) -> Curves:
    """By name; a layout that does not fit the model is left out, and one of both kinds has curves of its own."""
    parallel = report.layout.parallel
    layouts = list(_layouts(report.layout, num_ranks))
    if parallel.tensor_parallel_size > 1 and parallel.pipeline_parallel_size > 1:
        both = f"TP {parallel.tensor_parallel_size} x PP {parallel.pipeline_parallel_size}"
        layouts += [(f"{both}, literal", literal(report.layout)), (f"{both}, Headrace", report.layout)]
    requests = [replace(report.request, prompt_tokens=num_tokens) for num_tokens in _PROMPT_TOKENS]
    return {
        label: {request.prompt_tokens: _total(report, layout, request) for request in requests}
        for label, layout in layouts
    }


def curves_by_ranks(report: VolumeReport) -> Curves:
    """By name; sizes that do not fit the model are left out."""
    curves: Curves = {}
    for num_ranks in _NUM_RANKS:
        for label, layout in _layouts(report.layout, num_ranks):
            curves.setdefault(label, {})[num_ranks] = _total(report, layout, report.request)
    return curves


def _layouts(layout: Layout, num_ranks: int) -> Iterable[tuple[str, Layout]]:
    for name, sizes in (("TP", (num_ranks, 1)), ("PP", (1, num_ranks))):
        parallel = replace(
            layout.parallel, tensor_parallel_size=sizes[0], pipeline_parallel_size=sizes[1], pipeline_layers=None
        )
        try:
            split = replace(layout, parallel=parallel)
        except ParallelismError:
            continue
        yield f"{name}, literal", literal(split)
        yield f"{name}, Headrace", split


def _total(report: VolumeReport, layout: Layout, request: RequestShape) -> int:
    return sum(wire_bytes_by_phase(predict_request(layout, request, report.max_num_batched_tokens)).values())


def _style(label: str) -> str:
    layout, _, engine = label.partition(", ")
    return {"TP": "C0", "PP": "C1"}.get(layout, "C2") + ("--" if engine == "literal" else "-")
