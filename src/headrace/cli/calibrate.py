"""`headrace calibrate`: find the constant that suits the asynchronized softmax of each layer, and remember it."""

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headrace.cli.model_options import add_model_options, loading_config
from headrace.cli.terminal import aligned, is_watched, note
from headrace.cli.text_input import read_texts

if TYPE_CHECKING:
    from headrace.engine.calibrate import Calibration
    from headrace.kernels import SoftmaxCounts

_FILE_NAME = "softmax_calibration.json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = (
        "With --softmax asynchronized attention subtracts a constant from its logits instead of their maximum, which\n"
        "nothing has to wait for. Here text is run through the model to see where the largest logits of its rows lie;\n"
        f"the constant of each layer follows. The ranges are kept in {_FILE_NAME} beside the model, or in the\n"
        "user's cache for the model inside the package, and used from then on. Rows that the constant does not suit\n"
        "are computed again; layers whose rows differ too much keep the maximum. A second run, of the same text or of\n"
        "--check-text, has the constants in every layer, those that are off included, and counts the rows that were\n"
        "computed again."
    )
    parser.add_argument(
        "--text",
        action="append",
        metavar="FILE",
        help="UTF-8 text to run, repeatable (default: some 1500 words of plain English inside the package)",
    )
    parser.add_argument(
        "--check-text",
        action="append",
        metavar="FILE",
        help="UTF-8 text to count recomputed rows on, repeatable (default: the text of the calibration)",
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FILE",
        help=f"where to keep the ranges (default: {_FILE_NAME} beside the model, see below)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object, and nothing else")
    add_model_options(parser)


def run(args: argparse.Namespace) -> int:
    texts = read_texts(args.text)
    check_texts = read_texts(args.check_text) if args.check_text else None
    args.dataflow, args.softmax = "default", "synchronized"  # neither changes a range
    config = loading_config(args, show_progress=is_watched() and not args.json)
    # From here on torch is needed.
    from rich.console import Console
    from rich.progress import Progress

    from headrace.engine.calibrate import calibrate
    from headrace.models.model_folder import resolve_model_folder
    from headrace.models.softmax_calibration import check_can_save, prepare_calibration_file, save_calibration

    if args.output is None:
        folder = resolve_model_folder(config.load.model, config.load.revision, config.load.show_progress)
        file = prepare_calibration_file(folder)
    else:
        file = args.output
        check_can_save(file)
    with Progress(console=Console(stderr=True), disable=not config.load.show_progress, transient=True) as bar:
        task = bar.add_task("running the text", total=None)
        calibration = calibrate(
            config,
            texts,
            check_texts=check_texts,
            on_progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    save_calibration(calibration.layers, file)
    if args.json:
        print(json.dumps(_json(calibration, file)))
        return 0
    print("\n".join(_table(calibration)))
    note(f"kept in {file}")
    return 0


def _table(calibration: "Calibration") -> Iterator[str]:
    rows = [("layer", "99.99 % of logits", "row maxima", "constant", "computed again")]
    counts = calibration.counts or (None,) * len(calibration.layers)
    for index, (layer, choice, count) in enumerate(zip(calibration.layers, calibration.choices, counts, strict=True)):
        is_on = choice.reason is None
        rows.append(
            (
                str(index),
                _interval(layer.low_quantile, layer.high_quantile),
                _interval(layer.least_row_max, layer.largest_row_max),
                f"{choice.softmax.unified_max:.1f}" if is_on else "off",
                _rate(count),
            )
        )
    yield from aligned(rows)
    yield ""
    yield from (
        f"layer {index} stays synchronized: {choice.reason}"
        for index, choice in enumerate(calibration.choices)
        if choice.reason is not None
    )
    yield f"{calibration.num_tokens} tokens; natural logarithms."
    if calibration.counts is not None:
        yield from _explain_counts(calibration, calibration.counts)
    if calibration.counts is None:
        yield "These kernels have no asynchronized softmax; another start with native ones will use the ranges."


def _explain_counts(calibration: "Calibration", counts: "Sequence[SoftmaxCounts]") -> Iterator[str]:
    num_rows, num_again = (sum(c.num_rows for c in counts), sum(c.num_recomputed_rows for c in counts))
    share = num_again / max(1, num_rows)
    yield f"Computed again: {num_again} of {num_rows} rows ({share:.2%}) of {calibration.num_checked_tokens} tokens."
    if any(choice.reason is not None for choice in calibration.choices):
        yield "Layers that are off were forced for this count, with the middle of their row maxima."


def _json(calibration: "Calibration", file: Path) -> dict[str, Any]:
    counts = calibration.counts or (None,) * len(calibration.layers)
    return {
        "file": str(file),
        "num_tokens": calibration.num_tokens,
        "num_checked_tokens": calibration.num_checked_tokens,
        "layers": [
            asdict(layer)
            | {
                "scheme": choice.softmax.scheme.value,
                "unified_max": choice.softmax.unified_max if choice.reason is None else None,
                "safe_row_max": choice.safe_row_max,
                "reason": choice.reason,
                "num_rows": None if count is None else count.num_rows,
                "num_recomputed_rows": None if count is None else count.num_recomputed_rows,
            }
            for layer, choice, count in zip(calibration.layers, calibration.choices, counts, strict=True)
        ],
    }


def _interval(low: float, high: float) -> str:
    return f"{low:.1f} .. {high:.1f}"


def _rate(count: "SoftmaxCounts | None") -> str:
    if count is None or count.num_rows == 0:
        return "-"
    return f"{count.num_recomputed_rows / count.num_rows:.2%} of {count.num_rows}"
