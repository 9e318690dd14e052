"""`headrace bench quality`: what weight and KV cache formats cost in quality."""

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from headrace.cli.bench_options import check_left_out
from headrace.cli.environment import machine, versions
from headrace.cli.model_options import add_model_options, loading_config
from headrace.cli.progress_line import progress_line
from headrace.cli.terminal import aligned, format_bytes
from headrace.cli.text_input import read_texts
from headrace.config import LoadConfig
from headrace.demo_model import DEMO

if TYPE_CHECKING:
    from headrace.bench.quality import FormatQuality

_FORMATS = (
    "float32",
    "bfloat16",
    "int8",
    "int4",
    "float32-kv-bfloat16",
    "bfloat16-kv-int8",
    "int4-kv-int8",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = (
        "Text is run through the engine in each format, and every token of it is scored. Loss is in nats per token;\n"
        "the difference to bfloat16 comes with its standard error. Same token: how often the most likely next token\n"
        "is the one of bfloat16. Divergence is KL(bfloat16 || format) in nats per token, with all but the tokens that\n"
        "both find likely taken as one, which makes it a lower bound. kv names the format of the KV cache where it is\n"
        "not that of the activations. No format is fitted to any text, so every text is held out as far as the\n"
        "model's training has not seen it."
    )
    parser.add_argument(
        "--text",
        action="append",
        metavar="FILE",
        help="UTF-8 text to score, repeatable (default: some 1500 words of plain English inside the package)",
    )
    parser.add_argument(
        "--formats",
        nargs="+",
        choices=_FORMATS,
        default=_FORMATS,
        metavar="FORMAT",
        help=f"what to measure: {', '.join(_FORMATS)} (default: all); bfloat16 is always run, to compare with",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object, and nothing else")
    parser.add_argument("--quiet", action="store_true", help="show no progress")
    add_model_options(parser)


def run(args: argparse.Namespace) -> int:
    defaults = {"dtype": LoadConfig.dtype.value, "quantize": LoadConfig.quantize.value, "kv_cache_dtype": None}
    check_left_out(args, defaults, "--formats says what is compared")
    texts = read_texts(args.text)
    config = loading_config(args, show_progress=False)
    # From here on torch is needed.
    from headrace.bench.quality import FORMATS, measure_quality

    formats = [quality_format for quality_format in FORMATS if quality_format.name in args.formats]
    with progress_line(is_shown=not (args.json or args.quiet)) as on_start:
        found = list(measure_quality(config, texts, formats, on_start))
    if args.json:
        print(json.dumps(_json(args, found), allow_nan=False))
    else:
        print("\n".join(_table(args, found)))
    return 0


def _table(args: argparse.Namespace, found: "Sequence[FormatQuality]") -> Iterator[str]:
    rows = [("format", "weights", "loss", "to bfloat16", "same token", "divergence")]
    for quality in found:
        figures = quality.comparison
        rows.append(
            (
                quality.quality_format.name,
                format_bytes(quality.weight_bytes),
                f"{figures.loss:.4f}",
                f"{figures.loss_difference:+.4f} ± {figures.difference_error:.4f}",
                f"{figures.agreement:.2%}",
                f"{figures.divergence:.5f}",
            )
        )
    yield from aligned(rows)
    yield ""
    source = ", ".join(args.text) if args.text else "plain English inside the package"
    yield f"{args.model or DEMO}; {found[0].comparison.num_tokens} tokens of {source}; nats per token."


def _json(args: argparse.Namespace, found: "Sequence[FormatQuality]") -> dict[str, Any]:
    return {
        "model": args.model or DEMO,
        "text": args.text,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "formats": [
            {
                "name": quality.quality_format.name,
                "linear": quality.quality_format.linear.value,
                "kv_cache": quality.quality_format.kv_cache.value,
                "weight_bytes": quality.weight_bytes,
                **asdict(quality.comparison),
            }
            for quality in found
        ],
        "machine": machine(args.num_threads),
        "versions": versions(),
    }
