"""Headrace and other engines on the same weights, in turn: `python -m bench.compare comparison.toml --json FILE`.

Every engine runs in a process of its own, one after the other, and then all of them again: a busy minute of the machine
falls on all of them, and each figure's best round counts. Before each one the machine rests, and is listened to.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from bench.config import HEADRACE, Comparison, EngineSpec, read_comparison
from bench.machine_noise import CpuClock, CpuUse, remarks, wait_and_listen
from bench.peers.protocol import BATCH_SIZES, ROUNDS
from bench.report import table
from headrace.cli.environment import machine, versions

ROOT = Path(__file__).resolve().parents[1]
_TIMEOUT_S = 900.0
_FIGURES = ("prefill_512", "decode_from_512")

Report = dict[str, Any]
RunJson = Callable[[Sequence[str]], Report]


@dataclass
class Findings:
    """All rounds of all engines. failed: the last error of an engine that gave nothing in some round."""

    limits: list[Report] = field(default_factory=list)
    reports: dict[str, list[Report]] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    idle: list[CpuUse] = field(default_factory=list)
    running: list[CpuUse] = field(default_factory=list)


class EngineFailed(Exception):
    """An engine's process ended without a report."""


def command(spec: EngineSpec, threads: int, batch_sizes: Sequence[int], rounds: int) -> list[str]:
    """What measures one engine and prints its report as the last line."""
    sizes = [str(size) for size in batch_sizes]
    common = ["--threads", str(threads), "--rounds", str(rounds), "--batch-sizes", *sizes]
    if spec.engine == HEADRACE:
        options = ["--model", str(spec.model), "--quantize", spec.format, "--max-num-seqs", str(max(batch_sizes))]
        invariance = "--batch-invariant" if spec.batch_invariant else "--no-batch-invariant"
        return [sys.executable, "-m", "headrace", "bench", "model", "--json", invariance, *options, *common]
    return [str(spec.python), "-m", f"bench.peers.{spec.engine}", str(spec.model), *common]


def run_json(argv: Sequence[str]) -> Report:
    """
    Raises:
        EngineFailed: an exit code other than 0, no report, or too long.
    """
    threads = argv[argv.index("--threads") + 1]
    try:
        done = subprocess.run(
            argv,
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": threads},
            capture_output=True,
            text=True,
            timeout=_TIMEOUT_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise EngineFailed(str(error)) from error
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        raise EngineFailed((done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1])
    report: Report = json.loads(lines[-1])
    return report


def compare(
    comparison: Comparison,
    *,
    rounds: int,
    rounds_per_process: int,
    batch_sizes: Sequence[int],
    idle_s: float,
    prefix: Sequence[str] = (),
    run: RunJson = run_json,
    say: Callable[[str], None] = print,
    keep: Callable[[Findings], None] = lambda _: None,
) -> Findings:
    """All engines in turn, `rounds` times.

    prefix: a command that each measurement is run under, such as `taskset`. keep: takes all that was found so far,
    after each round, since a run may take an hour and be cut off.
    """
    findings = Findings()
    limits = [sys.executable, "-m", "bench.limits", "--threads", str(comparison.threads)]
    for index in range(rounds):
        findings.limits.append(_measure([*prefix, *limits], findings, idle_s, run))
        for spec in comparison.engines:
            argv = [*prefix, *command(spec, comparison.threads, batch_sizes, rounds_per_process)]
            try:
                report = _measure(argv, findings, idle_s, run)
            except EngineFailed as error:
                findings.failed[spec.key] = str(error)
                say(f"round {index + 1} of {rounds}, {spec.key}: {error}")
                continue
            findings.reports.setdefault(spec.key, []).append(report)
            say(f"round {index + 1} of {rounds}, {spec.key}: {_line(report)}")
        keep(findings)
    return findings


def _measure(argv: Sequence[str], findings: Findings, idle_s: float, run: RunJson) -> Report:
    findings.idle.append(wait_and_listen(idle_s))
    clock = CpuClock()
    report = run(argv)
    findings.running.append(clock.use())
    return report


def best(reports: Sequence[Report]) -> Report:
    """The best round of each figure by itself."""
    found: Report = {name: max(report[name] for report in reports) for name in _FIGURES}
    sizes = reports[0]["batched_decode"]
    found["batched_decode"] = {size: max(report["batched_decode"][size] for report in reports) for size in sizes}
    return found


def to_json(comparison: Comparison, findings: Findings, rounds_per_process: int) -> Report:
    specs = [spec for spec in comparison.engines if spec.key in findings.reports]
    read = [limits["read_gb_per_s"] for limits in findings.limits]
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "model": comparison.checkpoint.name,
        "threads": comparison.threads,
        "rounds": len(findings.limits),
        "rounds_per_process": rounds_per_process,
        "machine": machine(comparison.threads),
        "versions": versions(),
        "limits": findings.limits,
        "noise": remarks(findings.idle, findings.running, read),
        "cpu_use": {
            "idle": [asdict(use) for use in findings.idle],
            "running": [asdict(use) for use in findings.running],
        },
        "engines": [_engine_to_json(spec, findings.reports[spec.key]) for spec in specs],
        "failed": findings.failed,
    }


def _engine_to_json(spec: EngineSpec, reports: Sequence[Report]) -> Report:
    is_headrace = spec.engine == HEADRACE
    return {
        "engine": "Headrace" if is_headrace else reports[0]["engine"],
        "format": spec.format_name,
        "version": f"headrace {reports[0]['versions']['headrace']}" if is_headrace else reports[0]["version"],
        "is_headrace": is_headrace,
        **best(reports),
        "rounds": list(reports),
    }


def _line(report: Report) -> str:
    batched = ", ".join(f"{size}: {rate:.1f}" for size, rate in report["batched_decode"].items())
    return f"prefill {report['prefill_512']:.1f}, decode {report['decode_from_512']:.2f}, batches {batched}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("--json", type=Path, help="write everything here, anew after each round")
    parser.add_argument("--rounds", type=int, default=3, help="times that all engines run (default: %(default)s)")
    parser.add_argument("--rounds-per-process", type=int, default=ROUNDS, help="(default: %(default)s)")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=list(BATCH_SIZES))
    parser.add_argument("--idle-s", type=float, default=3.0, help="rest before each process (default: %(default)s)")
    parser.add_argument("--only", nargs="+", metavar="ENGINE", help="engines to run, such as headrace or llamacpp")
    parser.add_argument("--prefix", type=shlex.split, default=[], help="run each process under this command")
    args = parser.parse_args()
    comparison = read_comparison(args.config)
    if args.only:
        engines = tuple(spec for spec in comparison.engines if spec.engine in args.only)
        comparison = Comparison(checkpoint=comparison.checkpoint, threads=comparison.threads, engines=engines)

    def keep(findings: Findings) -> None:
        if args.json:
            report = to_json(comparison, findings, args.rounds_per_process)
            args.json.parent.mkdir(parents=True, exist_ok=True)
            args.json.write_text(json.dumps(report), encoding="utf-8")

    findings = compare(
        comparison,
        rounds=args.rounds,
        rounds_per_process=args.rounds_per_process,
        batch_sizes=args.batch_sizes,
        idle_s=args.idle_s,
        prefix=args.prefix,
        say=lambda line: print(line, flush=True),
        keep=keep,
    )
    print(table(to_json(comparison, findings, args.rounds_per_process)))
    if findings.failed:
        sys.exit("".join(f"\n{key} failed: {error}" for key, error in findings.failed.items()))


if __name__ == "__main__":
    main()
