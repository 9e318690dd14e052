"""A comparison as a table of Markdown."""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

_COLUMNS = {
    "prefill 512": ("prefill_512",),
    "decode from 512": ("decode_from_512",),
    "batch of 1": ("batched_decode", "1"),
    "4": ("batched_decode", "4"),
    "8": ("batched_decode", "8"),
    "16": ("batched_decode", "16"),
    "32": ("batched_decode", "32"),
}
_FORMAT_NAMES = {"none": "bf16"}

Engine = Mapping[str, Any]


def table(report: Mapping[str, Any]) -> str:
    """Tokens per second of every engine, then Headrace's multiples of the best other one, figure by figure."""
    engines: Sequence[Engine] = report["engines"]
    columns = {name: path for name, path in _COLUMNS.items() if any(_figure(e, path) is not None for e in engines)}
    others = [engine for engine in engines if not engine["is_headrace"]]
    rows = [[_name(engine), *(_rate(_figure(engine, path)) for path in columns.values())] for engine in engines]
    if others:
        for engine in (e for e in engines if e["is_headrace"]):
            cells = [_multiple(_figure(engine, path), _best(others, path)) for path in columns.values()]
            rows.append([f"{_name(engine)} / best other", *cells])
    lines = [["tokens/s", *columns], ["---", *["---:"] * len(columns)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n\n" + _caption(report)


def _figure(engine: Engine, path: Sequence[str]) -> float | None:
    value: Any = engine
    for key in path:
        value = value.get(key) if value is not None else None
    return None if value is None else float(value)


def _best(engines: Sequence[Engine], path: Sequence[str]) -> float | None:
    return max((found for engine in engines if (found := _figure(engine, path)) is not None), default=None)


def _name(engine: Engine) -> str:
    return f"{engine['engine']} {_FORMAT_NAMES.get(engine['format'], engine['format'])}"


def _rate(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def _multiple(ours: float | None, best_other: float | None) -> str:
    return "-" if ours is None or best_other is None else f"{ours / best_other:.2f}x"


def _caption(report: Mapping[str, Any]) -> str:
    date = datetime.fromisoformat(report["date"]).astimezone(UTC).date()
    versions = "; ".join(dict.fromkeys(engine["version"] for engine in report["engines"]))
    read = [limits["read_gb_per_s"] for limits in report["limits"]]
    peaks = {
        name: max(limits["multiply_gops"][name] for limits in report["limits"])
        for name in report["limits"][0]["multiply_gops"]
    }
    limits = ", ".join([f"{max(read):.1f} GB/s read", *(f"{value:,.0f} Gop/s {name}" for name, value in peaks.items())])
    noise = f" The machine was not quiet: {'; '.join(report['noise'])}." if report["noise"] else ""
    return (
        f"{report['model']}, {report['threads']} threads of {report['machine']['cpu']}, {date}; best of "
        f"{report['rounds']} rounds that take turns. Limits: {limits}.{noise} Versions: {versions}."
    )
