"""One process beside two ranks, with as many threads in all: `python -m bench.ranks --model MODEL --quantize int4`.

Layouts take turns, `headrace bench model` in a process of its own for each, and the best of the rounds counts: on a
shared machine only figures of one run can be compared.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from headrace.cli.terminal import aligned

LAYOUTS = {"one process": (), "TP 2": ("--tp", "2"), "PP 2": ("--pp", "2")}
BATCH_SIZES = (1, 4, 8, 16, 32)


def measure(arguments: list[str], layout: tuple[str, ...]) -> dict[str, Any]:
    """What `headrace bench model --json` prints."""
    command = [sys.executable, "-m", "headrace", "bench", "model", "--json", *arguments, *layout]
    command += ["--batch-sizes", *map(str, BATCH_SIZES)]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)


def figures(report: dict[str, Any]) -> dict[str, float]:
    """Tokens per second by what was measured."""
    batches = {f"batch of {size}": rate for size, rate in report["batched_decode"].items()}
    return {"prefill 512": report["prefill_512"], "decode from 512": report["decode_from_512"], **batches}


def exchange_shares(report: dict[str, Any]) -> dict[str, float]:
    """By the same names, what part of the time rank 0 spent in exchanges."""
    shares = report["exchange_shares"]
    return {
        "prefill 512": shares["prefill_512"],
        "decode from 512": shares["decode_from_512"],
        **{f"batch of {size}": shares[f"batched_decode_{size}"] for size in BATCH_SIZES},
    }


def best_of(rounds: list[dict[str, Any]]) -> tuple[dict[str, float], dict[str, float]]:
    """The highest figure of each kind, and the exchange share of the round it comes from."""
    rates, shares = {}, {}
    for name in figures(rounds[0]):
        best = max(rounds, key=lambda report: figures(report)[name])
        rates[name], shares[name] = figures(best)[name], exchange_shares(best)[name]
    return rates, shares


def table(best: dict[str, tuple[dict[str, float], dict[str, float]]]) -> list[str]:
    """Rates, ratios to one process, and shares; last what batches of 4 say of two stages that have 8."""
    alone, _ = best["one process"]
    rows = [("tokens/s", *(text for name in LAYOUTS for text in _header(name)))]
    for name, rate in alone.items():
        cells = [f"{rate:,.1f}"]
        for layout in list(LAYOUTS)[1:]:
            rates, shares = best[layout]
            cells += [f"{rates[name]:,.1f}", f"{rates[name] / rate:.1%}", f"{shares[name]:.1%}"]
        rows.append((name, *cells))
    two_stages = best["PP 2"][0]["batch of 8"]
    return [
        *aligned(rows),
        "",
        f"Two stages that have 8 requests run micro-batches of 4: {two_stages:,.1f} tokens/s, "
        f"{two_stages / alone['batch of 4']:.1%} of what one process makes of a batch of 4.",
    ]


def _header(layout: str) -> tuple[str, ...]:
    return (layout,) if layout == "one process" else (layout, "of one process", "in exchanges")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--quantize", default="int4")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each layout (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="keep every report, rewritten after each turn")
    args = parser.parse_args()
    arguments = ["--model", args.model, "--quantize", args.quantize, "--rounds", "2", "--decode-tokens", "32"]
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in LAYOUTS}
    for turn in range(args.rounds):
        for name, layout in LAYOUTS.items():
            print(f"round {turn + 1} of {args.rounds}: {name}", file=sys.stderr, flush=True)
            found[name].append(measure(arguments, layout))
        if args.json is not None:
            args.json.write_text(json.dumps(found))
    print("\n".join(table({name: best_of(reports) for name, reports in found.items()})))


if __name__ == "__main__":
    main()
