"""TP against PP against one process, between hosts with slow links: ``python -m bench.slow_links --model MODEL``.

Two hosts, played by network namespaces, of one thread each. In the same run an all-reduce is timed, alpha and beta are
fitted to it, and what `costs.links` then predicts stands beside what was measured. Needs root.

A figure that is in the file of --json and not measured anew is kept, so that a long table can be measured in pieces.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from headrace.config import ParallelConfig, SchedulerConfig
from headrace.config.parallel import AllReduceDtype
from headrace.costs.exchanges import Layout
from headrace.costs.links import Link, step_times
from headrace.costs.micro_batches import max_prompt_tokens
from headrace.costs.sites import Phase
from headrace.costs.steps import GREEDY_ROW_BYTES, ForwardPass, SampledRows
from headrace.models.config_file import read_config_file
from scripts.namespaces.mpi import mpiexec, why_not
from scripts.namespaces.network import CommandError, network

_LAYOUTS: Mapping[str, Mapping[str, Any]] = {
    "one process": {},
    "TP 2": {"tensor_parallel_size": 2},
    "TP 2, int8": {"tensor_parallel_size": 2, "all_reduce_dtype": "int8"},
    "PP 2": {"pipeline_parallel_size": 2},
}
_ONE = "one process"
_BATCH_SIZES = (1, 8, 32)
_PREFILL_TOKENS = 512
_DECODE_STEPS = 8
_TIMEOUT_S = 300

Figures = dict[str, dict[str, dict[str, Any]]]
"""By rate in Mbit/s, then layout: all_reduce_s by bytes, model_s by figure. JSON has strings for keys."""


def measure(layout: str, rates: Sequence[int], args: argparse.Namespace) -> dict[str, Any]:
    """By rate. One process exchanges nothing, and is measured once."""
    is_one = layout == _ONE
    # A micro-batch of a pipeline has half as many sequences: what that costs one process goes into its prediction.
    halves = {size // 2 for size in args.batch_sizes if size > 1} if is_one else set()
    settings = {
        "rates": [0] if is_one else list(rates),
        "figures": ["prefill"] if args.prefill else [],
        "prefill_tokens": _PREFILL_TOKENS,
        "batch_sizes": sorted({*args.batch_sizes, *halves}),
        "decode_steps": args.decode_steps,
        "model": {"model": args.model, "quantize": args.quantize, **_LAYOUTS[layout]},
    }
    with tempfile.NamedTemporaryFile(suffix=".json") as output:
        settings["output"] = output.name
        with network(1 if is_one else 2) as hosts:
            settings["namespaces"] = [] if is_one else hosts.namespaces
            command = [sys.executable, "-m", "bench.slow_links_rank", json.dumps(settings)]
            if is_one:
                subprocess.run(command, check=True, timeout=_TIMEOUT_S)
            else:
                with mpiexec(hosts, command) as started:
                    if started.wait(_TIMEOUT_S) != 0:
                        raise CommandError(f"the ranks of {layout} have failed")
        found: dict[str, Any] = json.loads(Path(output.name).read_text())
    return found


def fit(all_reduce_s: Mapping[str, float]) -> Link:
    """beta from the two largest messages, which are the two for which it matters; alpha from what is left of each.

    Between two ranks, payload is what one rank sends, whatever the algorithm.
    """
    times_s = {int(num_bytes): seconds for num_bytes, seconds in all_reduce_s.items()}
    sizes = sorted(times_s)
    bytes_per_s = (sizes[-1] - sizes[-2]) / (times_s[sizes[-1]] - times_s[sizes[-2]])
    alphas_s = tuple(max(0.0, times_s[size] - size / bytes_per_s) for size in sizes)
    return Link(alpha_s=alphas_s, bytes_per_s=bytes_per_s, max_bytes=tuple(sizes[:-1]))


def predict(layout: Layout, link: Link, one_process_s: Mapping[str, float], figure: str) -> float | None:
    """Seconds of a figure; None if one process was not measured where that is needed."""
    kind, size = figure.split()
    num_stages = layout.parallel.pipeline_parallel_size
    links = {"tp": link, "pp": link}
    if kind == "prefill":
        chunk = min(int(size), max_prompt_tokens(SchedulerConfig().max_num_batched_tokens, num_stages))
        num_chunks = -(-int(size) // chunk)
        step = step_times(
            layout, [ForwardPass(Phase.PREFILL, chunk)], one_process_s.get(figure, 0.0) / num_chunks, links
        )
        return step.latency_s + (num_chunks - 1) * step.interval_s if figure in one_process_s else None
    num_seqs = -(-int(size) // num_stages)
    compute_s = one_process_s.get(f"decode {num_seqs}")
    if compute_s is None:
        return None
    events = [
        ForwardPass(Phase.DECODE, num_seqs),
        SampledRows(Phase.DECODE, num_seqs, num_seqs * GREEDY_ROW_BYTES),
    ]
    step = step_times(layout, events, compute_s, links)
    return step.latency_s if num_seqs == int(size) else num_stages * step.interval_s


def with_predictions(figures: Figures, model: str) -> Figures:
    config = read_config_file(model).model
    one_process_s = figures.get("0", {}).get(_ONE, {}).get("model_s", {})
    for layouts in figures.values():
        for name, found in layouts.items():
            if "all_reduce_s" not in found:
                continue
            settings = dict(_LAYOUTS[name])
            if "all_reduce_dtype" in settings:
                settings["all_reduce_dtype"] = AllReduceDtype(settings["all_reduce_dtype"])
            layout = Layout(model=config, parallel=ParallelConfig(**settings), activation_bytes=2)
            link = fit(found["all_reduce_s"])
            found["alpha_us"] = [1e6 * seconds for seconds in link.alpha_s]
            found["mb_per_s"] = link.bytes_per_s / 1e6
            found["predicted_s"] = {figure: predict(layout, link, one_process_s, figure) for figure in found["model_s"]}
    return figures


def table(figures: Figures) -> str:
    """Tokens per second, measured and (predicted)."""
    names = [f"prefill {_PREFILL_TOKENS}", *(f"decode {size}" for size in _BATCH_SIZES)]
    rows = [["Mbit/s", "tokens/s", *names, "alpha, 4 KiB", "beta"]]
    for rate in sorted(figures, key=lambda rate: -int(rate) if int(rate) else float("-inf")):
        for layout, found in figures[rate].items():
            cells = [_cell(name, found) for name in names]
            link = (
                [f"{found['alpha_us'][0]:.0f} us", f"{found['mb_per_s']:.0f} MB/s"] if "alpha_us" in found else ["", ""]
            )
            rows.append(["no limit" if rate == "0" else rate, layout, *cells, *link])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i < 2 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )


def _cell(figure: str, found: Mapping[str, Any]) -> str:
    measured_s = found["model_s"].get(figure)
    if measured_s is None:
        return "-"
    num_tokens = int(figure.split()[1])
    predicted_s = found.get("predicted_s", {}).get(figure)
    measured = f"{num_tokens / measured_s:.2f}"
    return measured if predicted_s is None else f"{measured} ({num_tokens / predicted_s:.2f})"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.slow_links", description=__doc__)
    parser.add_argument("--model", required=True, help="a folder")
    parser.add_argument("--quantize", default="int4", choices=["int8", "int4"])
    parser.add_argument("--mbit-per-s", type=int, nargs="*", default=[0, 1000, 100], help="0: no limit")
    parser.add_argument("--layouts", nargs="*", default=list(_LAYOUTS), choices=list(_LAYOUTS))
    parser.add_argument("--batch-sizes", type=int, nargs="*", default=list(_BATCH_SIZES))
    parser.add_argument("--decode-steps", type=int, default=_DECODE_STEPS)
    parser.add_argument("--prefill", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--json", type=Path, metavar="FILE", help="keep the figures here, and show all that are there")
    args = parser.parse_args()
    if (reason := why_not()) is not None:
        print(f"error: {reason}", file=sys.stderr)
        return 1
    figures: Figures = json.loads(args.json.read_text()) if args.json is not None and args.json.exists() else {}
    try:
        for layout in args.layouts:
            for rate, found in measure(layout, args.mbit_per_s, args).items():
                kept = figures.setdefault(rate, {}).setdefault(layout, {})
                kept.setdefault("model_s", {}).update(found.pop("model_s"))
                kept.update(found)
    except (CommandError, subprocess.SubprocessError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    figures = with_predictions(figures, args.model)
    if args.json is not None:
        args.json.write_text(json.dumps(figures, indent=1))
    print(table(figures))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
