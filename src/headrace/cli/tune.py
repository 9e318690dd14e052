"""`headrace tune`: measure which implementations suit a model on this machine, and remember them."""

import argparse
import json
from collections.abc import Mapping
from itertools import starmap
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headrace.cli.model_options import add_model_options, make_llm
from headrace.cli.terminal import is_watched, note
from headrace.errors import ConfigError

if TYPE_CHECKING:
    from headrace.kernels.tuning_cache import Section

_ROUNDS = 12
_SINGLE = ("attention", "prefill", "mixture")
"""Sections with one result for a model."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = (
        "GEMV takes one row at a time, flat GEMM all rows at each pass over the weights, GEMM blocks of rows. For\n"
        "each shape of the model all three are timed over M, the number of rows, in turn and several times; the best\n"
        "times give the two points where one is overtaken by the next. Attention of one new token is timed over the\n"
        "length of the context, by softmax scheme and by the number of pieces that threads share. On a GPU each\n"
        "implementation first finds the best of its tiles, launches are timed in a CUDA graph, attention also for\n"
        "batches, mixtures of experts for few and many tokens with each of the tiles their launches can take, and\n"
        "attention of prompts as the kernel and as the library compute it. All is kept in the user's cache for this\n"
        "CPU and number of threads, or this GPU, and this build of the kernels, and later starts use it. Close other\n"
        "programs first."
    )
    parser.add_argument(
        "--rounds",
        type=int,
        default=_ROUNDS,
        metavar="N",
        help="rounds, of which the best counts (default: %(default)s)",
    )
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw time against M, as .png, .svg or .pdf")
    parser.add_argument("--json", action="store_true", help="print one JSON object, and nothing else")
    add_model_options(parser, with_ranks=True)


def run(args: argparse.Namespace) -> int:
    if args.rounds < 1:
        raise ConfigError(f"--rounds is {args.rounds}; it must be at least 1")
    if args.plot is not None:
        from headrace.cli.plots import check_can_plot

        check_can_plot(args.plot)
    # From here on torch is needed.
    from headrace.cli.tune_tables import TABLES
    from headrace.engine.tune_kinds import kinds_of
    from headrace.kernels.tuning import LINEAR
    from headrace.kernels.tuning_cache import TuningCache

    args.dataflow = "default"  # nothing is looked up or measured but here
    show_progress = is_watched() and not args.json
    model = make_llm(args, show_progress=show_progress, require_tokenizer=False).engine.model
    if model.kernels.tuning_key is None:
        raise ConfigError("there is nothing to tune: the reference has one implementation of linear layers only")
    cache = TuningCache(model.kernels.tuning_key(model.plan.num_threads))
    measured: dict[Section[Any, Any], dict[Any, Any]] = {}
    is_kept, stopped = True, None
    for kind in kinds_of(model, args.rounds, show_progress=show_progress):
        found = measured[kind.section] = kind.measure()
        is_kept = cache.keep(kind.section, found) and is_kept
        if len(found) < kind.num_results:
            stopped = f"stopped at {kind.what}: {len(found)} of {kind.num_results} measured"
            break
    if args.plot is not None:
        from headrace.cli.tune_plot import plot

        plot(measured[LINEAR], args.plot)
    if args.json:
        print(json.dumps({"file": str(cache.file) if is_kept else None, **_report(measured)}))
        return 0
    print("\n\n".join("\n".join(TABLES[section.name](found)) for section, found in measured.items() if found))
    note(f"kept in {cache.file}" if is_kept else f"could not be kept: {cache.file} cannot be written")
    if stopped is not None:
        note(stopped)
    return 0


def _report(measured: "Mapping[Section[Any, Any], Mapping[Any, Any]]") -> dict[str, Any]:
    """Of linear layers, which are several, a list; of the others None if they were not measured."""
    entries = {section.name: list(starmap(section.to_json, found.items())) for section, found in measured.items()}
    linear = [{name: value for name, value in entry.items() if name != "measured_on"} for entry in entries["linear"]]
    return {"linear": linear} | {name: next(iter(entries.get(name, [])), None) for name in _SINGLE}
