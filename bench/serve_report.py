"""A comparison of servers under load, as JSON and as a table of Markdown."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from statistics import median
from typing import Any

from bench.machine_noise import CpuUse, remarks
from bench.serve_targets import ServerTarget
from headrace.cli.environment import machine, versions

ENGINE_ALONE = "engine alone"
_HIGHER_IS_BETTER = ("output_tokens_per_s", "decode_tokens_per_s")
_LATENCIES = ("ttft_ms", "tpot_ms", "e2e_ms")

Report = dict[str, Any]


def to_json(protocol: Mapping[str, Any], targets: Sequence[ServerTarget], findings: Mapping[str, Any]) -> Report:
    rounds: Mapping[str, list[Report]] = findings["rounds"]
    idle, busy = ([CpuUse(**use) for use in findings[name]] for name in ("idle", "running"))
    headrace = next(target.name for target in targets if target.is_headrace)
    others = [target.name for target in targets if not target.is_headrace]
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "protocol": {name: str(value) if name == "model" else value for name, value in protocol.items()},
        "model": protocol["model"].name,
        "rounds": findings["num_rounds"],
        "machine": machine(protocol["threads"]),
        "versions": versions(),
        "noise": remarks(idle, busy, []),
        "cpu_use": {"idle": [asdict(use) for use in idle], "running": [asdict(use) for use in busy]},
        "targets": [
            _target(ENGINE_ALONE, rounds.get(ENGINE_ALONE, [])),
            *(_target(t.name, rounds.get(t.name, []), t) for t in targets),
        ],
        "http_cost": {
            figure: _by_level(rounds, headrace, ENGINE_ALONE, figure, lambda ratio: 1 - ratio)
            for figure in _HIGHER_IS_BETTER
        },
        "over": {
            name: {figure: _by_level(rounds, headrace, name, figure) for figure in _HIGHER_IS_BETTER} for name in others
        },
        "failed": findings["failed"],
    }


def table(report: Mapping[str, Any]) -> str:
    """Every target's output tokens per second by streams, its pace at the most of them, and its start."""
    streams = [str(n) for n in report["protocol"]["concurrency"]]
    most = streams[-1]
    head = [f"{n} stream{'s' * (n != '1')}" for n in streams]
    head += [f"decode alone, {most}", f"TTFT p50, {most}", f"TPOT p50, {most}", "ready", "reading the weights"]
    rows = [_row(target, streams) for target in report["targets"] if target["best"]]
    for name, ratios in report["over"].items():
        cells = [_times(ratios["output_tokens_per_s"].get(n)) for n in streams]
        rows.append([f"Headrace / {name}", *cells, _times(ratios["decode_tokens_per_s"].get(most)), *["-"] * 4])
    costs = report["http_cost"]
    cells = [_percent(costs["output_tokens_per_s"].get(n)) for n in streams]
    rows.append(["cost of HTTP", *cells, _percent(costs["decode_tokens_per_s"].get(most)), *["-"] * 4])
    lines = [["output tokens/s", *head], ["---", *["---:"] * len(head)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n\n" + _caption(report)


def _target(name: str, rounds: Sequence[Report], target: ServerTarget | None = None) -> Report:
    """best: of each figure by itself, over the rounds."""
    return {
        "name": name,
        "format": None if target is None else target.format,
        "is_headrace": target is None or target.is_headrace,
        "command": None if target is None else list(target.command),
        "weight_bytes": None if target is None else sum(file.stat().st_size for file in target.weights),
        "best": _best(rounds),
        "ready_s": [found["ready_s"] for found in rounds if "ready_s" in found],
        "read_weights_s": [found["read_weights_s"] for found in rounds if "read_weights_s" in found],
        "rounds": list(rounds),
    }


def _best(rounds: Sequence[Report]) -> Report:
    best: Report = {}
    for streams in rounds[0]["levels"] if rounds else ():
        levels = [found["levels"][streams] for found in rounds]
        best[streams] = {name: _extreme(max, [level.get(name) for level in levels]) for name in _HIGHER_IS_BETTER}
        for name in _LATENCIES:
            best[streams][f"{name[:-3]}_p50_ms"] = _extreme(
                min, [(level.get(name) or {}).get("p50") for level in levels]
            )
    return best


def _extreme(choose: Any, values: Sequence[float | None]) -> float | None:
    return choose((value for value in values if value is not None), default=None)  # type: ignore[no-any-return]


def _by_level(
    rounds: Mapping[str, list[Report]], ours: str, other: str, figure: str, of_ratio: Any = lambda ratio: ratio
) -> dict[str, float]:
    """Our figure over the other's in the same round, and of these the median."""
    others = {found["round"]: found for found in rounds.get(other, [])}
    ratios: dict[str, list[float]] = {}
    for found in rounds.get(ours, []):
        beside = others.get(found["round"])
        for streams, level in found["levels"].items():
            divisor = beside and beside["levels"][streams].get(figure)
            if divisor and level.get(figure):
                ratios.setdefault(streams, []).append(of_ratio(level[figure] / divisor))
    return {streams: median(values) for streams, values in ratios.items()}


def _row(target: Mapping[str, Any], streams: Sequence[str]) -> list[str]:
    best, most = target["best"], streams[-1]
    name = (
        "Headrace, engine alone" if target["name"] == ENGINE_ALONE else f"{target['name']} {target['format']}, server"
    )
    return [
        name,
        *(_rate(best[n]["output_tokens_per_s"]) for n in streams),
        _rate(best[most]["decode_tokens_per_s"]),
        *(_ms(best[most][figure]) for figure in ("ttft_p50_ms", "tpot_p50_ms")),
        *(_seconds(min(target[figure], default=None)) for figure in ("ready_s", "read_weights_s")),
    ]


def _caption(report: Mapping[str, Any]) -> str:
    protocol = report["protocol"]
    date = datetime.fromisoformat(report["date"]).astimezone(UTC).date()
    noise = f" The machine was not quiet: {'; '.join(report['noise'])}." if report["noise"] else ""
    return (
        f"{report['model']}, {protocol['threads']} threads of {report['machine']['cpu']}, shared with the load "
        f"generator, {date}. Prompts of {protocol['prompt_tokens']} tokens, outputs of {protocol['output_tokens']}, "
        f"{protocol['waves']} requests a stream; best of {report['rounds']} rounds that take turns, ratios are medians "
        f"of the rounds.{noise}"
    )


def _rate(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def _ms(value: float | None) -> str:
    return "-" if value is None else f"{value:.0f} ms"


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f} s"


def _times(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}x"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"
