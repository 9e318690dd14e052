"""Headrace's server, its engine alone, and llama.cpp's server under the same load, in turn.

    bench/build_llama_server.sh DIRECTORY
    python -m bench.peers.to_gguf MODEL MODEL.gguf --type q4_0 --vocabulary     # needs gguf
    python -m bench.serve_compare --model MODEL --quantize int4 --gguf MODEL.gguf \
        --llama-server DIRECTORY/build/bin/llama-server --json runs/load.json

Each target starts in a process of its own, answers a closed loop of `headrace bench serve` at each number of streams,
and ends; then the next one, and then all again: a busy minute falls on all. Prompts are random token ids, the same for
all, ends of sequences are ignored, and sampling is greedy.
"""

import argparse
import json
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from bench.machine_noise import CpuClock, CpuUse, wait_and_listen
from bench.serve_report import ENGINE_ALONE, table, to_json
from bench.serve_targets import (
    ROOT,
    ServerTarget,
    Shape,
    TargetFailed,
    headrace,
    llama_server,
    read_weights_s,
    running,
)

_TIMEOUT_S = 1800.0
_SPARE_TOKENS = 16
_LAST_LINES = 3

Report = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """waves: requests of each stream. seed: of the first round's prompts; each round has its own."""

    model: Path
    quantize: str
    threads: int
    prompt_tokens: int
    output_tokens: int
    concurrency: tuple[int, ...]
    waves: int
    vocab_size: int
    dataflow: str = "measured"
    seed: int = 0

    @property
    def shape(self) -> Shape:
        length = self.prompt_tokens + self.output_tokens + _SPARE_TOKENS
        return Shape(max_num_seqs=max(self.concurrency), max_model_len=length, threads=self.threads)

    @property
    def request_mix(self) -> str:
        return f"{self.prompt_tokens}:{self.output_tokens}"


@dataclass
class Findings:
    """rounds: by target, a list of {"levels": {streams: figures}} and, of servers, ready_s and read_weights_s."""

    rounds: dict[str, list[Report]] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    idle: list[CpuUse] = field(default_factory=list)
    running: list[CpuUse] = field(default_factory=list)
    num_rounds: int = 0


def measure_server(
    target: ServerTarget, protocol: Protocol, seed: int, log: Path, prefix: Sequence[str] = ()
) -> Report:
    """Start it, load it at every level, end it."""
    read_s = read_weights_s(target.weights)
    levels = {}
    with running(target, log, prefix) as server:
        for index, concurrency in enumerate(protocol.concurrency):
            levels[str(concurrency)] = _bench_serve(server.url, protocol, concurrency, seed + index)
        return {"ready_s": server.ready_s, "read_weights_s": read_s, "levels": levels}


def measure_engine(protocol: Protocol, seed: int, prefix: Sequence[str] = ()) -> Report:
    argv = [
        *(sys.executable, "-m", "bench.engine_load", "--model", str(protocol.model), "--quantize", protocol.quantize),
        *("--threads", str(protocol.threads), "--max-num-seqs", str(protocol.shape.max_num_seqs)),
        *("--request-mix", protocol.request_mix, "--waves", str(protocol.waves)),
        *("--vocab-size", str(protocol.vocab_size), "--seed", str(seed), "--dataflow", protocol.dataflow),
        *("--concurrency", *map(str, protocol.concurrency)),
    ]
    return {"levels": _run_json([*prefix, *argv])}


def _bench_serve(url: str, protocol: Protocol, concurrency: int, seed: int) -> Report:
    found = _run_json(
        [
            *(sys.executable, "-m", "headrace", "bench", "serve", "--json", "--base-url", url, "--ignore-eos"),
            *("--concurrency", str(concurrency), "--num-requests", str(concurrency * protocol.waves)),
            *("--request-mix", protocol.request_mix, "--vocab-size", str(protocol.vocab_size), "--seed", str(seed)),
        ]
    )
    if found["num_failed"] or found["num_short_outputs"]:
        raise TargetFailed(f"at {concurrency} streams: {'; '.join(found['remarks'])}; {found['failures']}")
    return found


def _run_json(argv: Sequence[str]) -> Report:
    try:
        done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise TargetFailed(str(error)) from error
    if done.returncode or not done.stdout.strip():
        lines = done.stderr.strip().splitlines()[-_LAST_LINES:]
        raise TargetFailed(" ".join(lines) or f"exit code {done.returncode}")
    report: Report = json.loads(done.stdout.strip().splitlines()[-1])
    return report


Measurement = Callable[[int], Report]
"""Of a round's seed."""


def compare(
    measurements: dict[str, Measurement],
    *,
    rounds: int,
    seed: int,
    idle_s: float,
    say: Callable[[str], None] = print,
    keep: Callable[[Findings], None] = lambda _: None,
) -> Findings:
    """All in turn, `rounds` times, every second time in the other order.

    keep: takes all that was found so far, after each round.
    """
    findings = Findings()
    for index in range(rounds):
        names = list(measurements)
        for name in names if index % 2 == 0 else reversed(names):
            findings.idle.append(wait_and_listen(idle_s))
            clock = CpuClock()
            try:
                found = measurements[name](seed + 1000 * index)
            except TargetFailed as error:
                findings.failed[name] = str(error)
                say(f"round {index + 1} of {rounds}, {name}: {error}")
                continue
            findings.running.append(clock.use())
            findings.rounds.setdefault(name, []).append(found | {"round": index})
            say(f"round {index + 1} of {rounds}, {name}: {_line(found)}")
        findings.num_rounds = index + 1
        keep(findings)
    return findings


def _line(found: Report) -> str:
    rates = ", ".join(f"{streams}: {level['output_tokens_per_s']:.1f}" for streams, level in found["levels"].items())
    ready = f"ready after {found['ready_s']:.2f} s; " if "ready_s" in found else ""
    return f"{ready}output tokens/s {rates}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="a folder")
    parser.add_argument("--quantize", default="none", help="as `headrace serve` takes it (default: %(default)s)")
    parser.add_argument("--dataflow", default="measured", help="as `headrace serve` takes it (default: %(default)s)")
    parser.add_argument("--llama-server", type=Path, help="left out: Headrace alone")
    parser.add_argument("--gguf", type=Path, help="the same weights, with a vocabulary")
    parser.add_argument("--json", type=Path, help="write everything here, anew after each round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--output-tokens", type=int, default=128)
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 8, 16])
    parser.add_argument("--waves", type=int, default=2, help="requests of each stream (default: %(default)s)")
    parser.add_argument("--idle-s", type=float, default=3.0, help="rest before each target (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--prefix", type=shlex.split, default=[], help="run what is measured under this command")
    parser.add_argument("--headrace-options", type=shlex.split, default=[], help="more for `headrace serve` alone")
    parser.add_argument("--llama-options", type=shlex.split, default=[], help="more for llama-server")
    args = parser.parse_args()
    if (args.llama_server is None) != (args.gguf is None):
        parser.error("--llama-server and --gguf come together")
    config = json.loads((args.model / "config.json").read_text(encoding="utf-8"))
    protocol = Protocol(
        model=args.model.resolve(),
        quantize=args.quantize,
        threads=args.threads,
        prompt_tokens=args.prompt_tokens,
        output_tokens=args.output_tokens,
        concurrency=tuple(args.concurrency),
        waves=args.waves,
        vocab_size=config["vocab_size"],
        dataflow=args.dataflow,
        seed=args.seed,
    )
    options = ["--dataflow", protocol.dataflow, *args.headrace_options]
    targets = [headrace(protocol.model, _stored_format(config), protocol.quantize, protocol.shape, options)]
    if args.llama_server is not None:
        llama = llama_server(args.llama_server.resolve(), args.gguf.resolve(), protocol.shape, args.llama_options)
        targets.append(llama)
    with tempfile.TemporaryDirectory(prefix="serve-compare-") as folder:
        findings = compare(
            _measurements(targets, protocol, Path(folder), args.prefix),
            rounds=args.rounds,
            seed=protocol.seed,
            idle_s=args.idle_s,
            say=lambda line: print(line, flush=True),
            keep=lambda so_far: _write(args.json, to_json(asdict(protocol), targets, asdict(so_far))),
        )
    print(table(to_json(asdict(protocol), targets, asdict(findings))))
    if findings.failed:
        sys.exit("".join(f"\n{name} failed: {error}" for name, error in findings.failed.items()))


def _stored_format(config: dict[str, Any]) -> str:
    return str(config.get("quantization_config", {}).get("weight_format", config.get("dtype", "as stored")))


def _measurements(
    targets: Sequence[ServerTarget], protocol: Protocol, folder: Path, prefix: Sequence[str]
) -> dict[str, Measurement]:
    """The engine alone stands beside Headrace's server, so that a slow minute falls on both."""

    def server(target: ServerTarget) -> Measurement:
        return lambda seed: measure_server(target, protocol, seed, folder / f"{target.name}.log", prefix)

    engine: Measurement = lambda seed: measure_engine(protocol, seed, prefix)
    return {ENGINE_ALONE: engine, **{target.name: server(target) for target in targets}}


def _write(file: Path | None, report: Report) -> None:
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        part = file.with_suffix(".part")
        part.write_text(json.dumps(report), encoding="utf-8")
        part.replace(file)


if __name__ == "__main__":
    main()
