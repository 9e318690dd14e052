"""What was found, as short tables of text or of Markdown."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from scripts.gpu_check.figures import Figure, Results
from scripts.gpu_check.suites import summary
from scripts.gpu_check.targets import copy_bytes_per_s, verdicts

_NUM_TROUBLES = 15
_WIDTH = 160


@dataclass(frozen=True, kw_only=True)
class Table:
    title: str
    rows: Sequence[Sequence[str]]
    num_left: int = 1

    @property
    def is_empty(self) -> bool:
        return len(self.rows) < 2


def text(results: Results) -> str:
    """For a terminal: what matters most last, and not each implementation that was not chosen."""
    parts = []
    for table in tables(results, is_short=True):
        if not table.is_empty:
            parts += [table.title, *_aligned(table), ""]
    parts += [*_tests(results), *_troubles(results), "", headline(results), *_aligned(_verdicts(results))]
    return "\n".join(line[:_WIDTH].rstrip() for line in parts)


def markdown(results: Results) -> str:
    """The fragment that docs/gpu.md takes in."""
    parts = [headline(results), ""]
    for table in (_verdicts(results), *tables(results, is_short=False)):
        if not table.is_empty:
            header, *rows = table.rows
            rule = ["---"] * table.num_left + ["---:"] * (len(header) - table.num_left)
            lines = ["| " + " | ".join(row) + " |" for row in (header, rule, *rows)]
            parts += [f"**{table.title}**", "", *lines, ""]
    parts += [*_tests(results), *_troubles(results)]
    return "\n".join(parts).rstrip() + "\n"


def headline(results: Results) -> str:
    facts = results.facts
    packages = facts.get("packages", {})
    versions = ", ".join(f"{name} {packages[name]}" for name in ("torch", "triton") if packages.get(name))
    where = facts.get("device") or "no GPU: figures mean nothing"
    return f"{where}; {versions}; {str(facts.get('date', ''))[:10]}; commit {facts.get('commit') or 'unknown'}"


def tables(results: Results, *, is_short: bool) -> Iterator[Table]:
    yield _limits(results)
    yield from _linears(results, is_short=is_short)
    yield from _attention(results, "decode attention")
    yield from _attention(results, "prefill attention")
    yield from _attention(results, "chunk attention")
    yield _decode(results)
    yield _prefill(results)
    yield _ablation(results, "all", "each idea switched off: ms a step (rate relative to all three on)")
    yield _ablation(results, "none", "each idea alone: ms a step (rate relative to none of them on)")


def _limits(results: Results) -> Table:
    rows = [("limit", "measured")]
    for figure in results.of("limit"):
        value = f"{figure.seconds * 1e6:.1f} us"
        if figure.num_bytes:
            value = f"{figure.bytes_per_s / 1e9:,.0f} GB/s"
        elif figure.num_ops:
            value = f"{figure.ops_per_s / 1e12:,.1f} Top/s"
        rows.append((str(figure.labels["name"]), value))
    return Table(title="limits", rows=rows)


def _linears(results: Results, *, is_short: bool) -> Iterator[Table]:
    """One table for each format: share of copy bandwidth over the weight, and how often faster than cuBLAS."""
    bandwidth = copy_bytes_per_s(results)
    arms = [arm for arm in _values(results, "linear", "arm") if arm == "chosen" or not is_short]
    for weight_format in _values(results, "linear", "format"):
        all_rows = _values(results, "linear", "rows")
        table = [["layer", "by", *(f"M = {m}" for m in all_rows)]]
        for layer in _values(results, "linear", "layer"):
            for arm in arms:
                cells = [_linear_cell(results, bandwidth, weight_format, layer, m, arm) for m in all_rows]
                if any(cells):
                    table.append([str(layer), str(arm), *cells])
        title = f"linear, {weight_format}: us, share of copy bandwidth over the weight (times bfloat16 cuBLAS)"
        yield Table(title=title, rows=table, num_left=2)


def _linear_cell(results: Results, bandwidth: float | None, weight_format: Any, layer: Any, rows: Any, arm: Any) -> str:
    labels = {"format": weight_format, "layer": layer, "rows": rows}
    figure, library = results.one("linear", arm=arm, **labels), results.one("linear", arm="cuBLAS", **labels)
    if figure is None or not figure.is_timed:
        return _difference(figure)
    is_compared = library is not None and library.is_timed and library is not figure
    ratio = f" ({library.seconds / figure.seconds:.2f})" if is_compared else ""
    share = "" if bandwidth is None else f" {figure.bytes_per_s / bandwidth:.0%}"
    return f"{_microseconds(figure)}{share}{ratio}{_mark(figure)}"


def _attention(results: Results, group: str) -> Iterator[Table]:
    """Decoding is compared with bandwidth, prompts with the product of matrices."""
    bandwidth, product = copy_bytes_per_s(results), results.one("limit", name="multiply bfloat16")
    for heads in _values(results, group, "heads"):
        names = _values(results, group, "by")
        table = [["batch", "tokens", *map(str, names), "fastest"]]
        pairs = dict.fromkeys((f.labels["batch"], f.labels["context"]) for f in results.of(group, heads=heads))
        for batch, context_len in pairs:
            place = {"heads": heads, "batch": batch, "context": context_len}
            figures = [results.one(group, by=name, **place) for name in names]
            cells = [_attention_cell(figure, group, bandwidth, product) for figure in figures]
            table.append([str(batch), str(context_len), *cells, _fastest(results.of(group, **place))])
        limit = "copy bandwidth" if group.startswith("decode") else "the bfloat16 product"
        yield Table(title=f"{group}, heads {heads}: us, share of {limit}", rows=table)


def _fastest(figures: Sequence[Figure]) -> str:
    """Whose right result came first."""
    right = [figure for figure in figures if figure.is_right]
    return str(min(right, key=lambda figure: figure.seconds).labels["by"]) if right else ""


def _attention_cell(figure: Figure | None, group: str, bandwidth: float | None, product: Figure | None) -> str:
    if figure is None or not figure.is_timed:
        return _difference(figure)
    share = None
    if group.startswith("decode") and bandwidth is not None:
        share = figure.bytes_per_s / bandwidth
    elif not group.startswith("decode") and product is not None:
        share = figure.ops_per_s / product.ops_per_s
    return f"{_microseconds(figure)}{'' if share is None else f' {share:.0%}'}{_mark(figure)}"


def _decode(results: Results) -> Table:
    bandwidth = copy_bytes_per_s(results)
    cases = list(dict.fromkeys((f.labels["batch"], f.labels["context"]) for f in results.of("decode")))
    rows = [("decode", "format", *(f"{batch} x {length}" for batch, length in cases))]
    for name, weight_format in dict.fromkeys((f.labels["by"], f.labels["format"]) for f in results.of("decode")):
        labels = {"by": name, "format": weight_format}
        figures = [results.one("decode", batch=batch, context=length, **labels) for batch, length in cases]
        note = " (not replayed)" if any(f.note for f in figures if f is not None) else ""
        rows.append((str(name), f"{weight_format}{note}", *(_step_cell(f, bandwidth) for f in figures)))
    title = "decode, end to end: ms a step for sequences x context (share of copy bandwidth over weights and cache)"
    return Table(title=title, rows=rows, num_left=2)


def _step_cell(figure: Figure | None, bandwidth: float | None) -> str:
    if figure is None or not figure.is_timed:
        return _difference(figure)
    share = "" if bandwidth is None or not figure.num_bytes else f" ({figure.bytes_per_s / bandwidth:.0%})"
    return f"{figure.seconds * 1e3:.2f}{share}"


def _prefill(results: Results) -> Table:
    lengths = _values(results, "prefill", "tokens")
    rows = [("prefill", "format", *(f"{n} tokens" for n in lengths))]
    pairs = dict.fromkeys((f.labels["by"], f.labels["format"]) for f in results.of("prefill"))
    for name, weight_format in pairs:
        figures = [results.one("prefill", by=name, format=weight_format, tokens=n) for n in lengths]
        cells = ["" if f is None else f"{f.seconds * 1e3:.1f} ms" for f in figures]
        rows.append((str(name), str(weight_format), *cells))
    return Table(title="prefill, end to end", rows=rows, num_left=2)


def _ablation(results: Results, baseline: str, title: str) -> Table:
    """Of the variants that are compared with one baseline."""
    found = results.of("ablation", baseline=baseline)
    cases = list(dict.fromkeys((f.labels["batch"], f.labels["context"]) for f in found))
    rows = [("ablation", *(f"batch {batch}, context {length}" for batch, length in cases))]
    for label in dict.fromkeys(f.labels["label"] for f in found):
        cells = []
        for batch, length in cases:
            figure = results.one("ablation", label=label, batch=batch, context=length)
            base = results.one("ablation", variant=baseline, batch=batch, context=length)
            ratio = "" if figure is None or base is None else f" ({base.seconds / figure.seconds:.3f})"
            cells.append("" if figure is None else f"{figure.seconds * 1e3:.3f}{ratio}")
        rows.append((str(label), *cells))
    return Table(title=title, rows=rows)


def _verdicts(results: Results) -> Table:
    rows = [("target", "needed", "measured", "", "at")]
    for verdict in verdicts(results):
        word = {True: "met", False: "NOT MET", None: "not measured"}[verdict.is_met]
        rows.append((verdict.name, verdict.needed, verdict.value or "", word, verdict.where))
    return Table(title="targets", rows=rows)


def _tests(results: Results) -> Iterator[str]:
    for name, found in results.tests.items():
        yield f"tests, {name}: {summary(found)}"
        for failure in found["failures"][:_NUM_TROUBLES]:
            yield f"  {failure['test']}: {' '.join(failure['message'].split())}"[:_WIDTH]


def _troubles(results: Results) -> Iterator[str]:
    found = sorted(results.troubles.values(), key=lambda trouble: not trouble.is_failure)
    for trouble in found[:_NUM_TROUBLES]:
        yield f"{'FAILED' if trouble.is_failure else 'left out'}: {trouble.unit}: {trouble.message}"[:_WIDTH]
    if len(found) > _NUM_TROUBLES:
        yield f"and {len(found) - _NUM_TROUBLES} more, see the JSON file"


def _values(results: Results, group: str, label: str) -> list[str | int]:
    """In the order in which they were measured, numbers ascending."""
    found = list(dict.fromkeys(figure.labels[label] for figure in results.of(group)))
    return sorted(found) if all(isinstance(value, int) for value in found) else found


def _microseconds(figure: Figure) -> str:
    value = figure.seconds * 1e6
    return f"{value:.1f}" if value < 100 else f"{value:.0f}"


def _difference(figure: Figure | None) -> str:
    """In the place of a time that was not taken; nothing where nothing was tried."""
    return "" if figure is None else f"differs from the reference by {figure.error:.2g}"


def _mark(figure: Figure) -> str:
    return f"{'' if figure.is_right else ' WRONG'}"


def _aligned(table: Table) -> list[str]:
    widths = [max(len(row[i]) for row in table.rows) for i in range(len(table.rows[0]))]
    cell: Callable[[int, str], str] = lambda i, value: (
        value.ljust(widths[i]) if i < table.num_left or i == len(widths) - 1 else value.rjust(widths[i])
    )
    return ["  ".join(cell(i, value) for i, value in enumerate(row)) for row in table.rows]
