"""headrace quantize: save a checkpoint with integer weights."""

import argparse
import sys
from pathlib import Path

import headrace
from headrace.config import Quantize


def add_arguments(parser: argparse.ArgumentParser) -> None:
    formats = [member.value for member in Quantize if member is not Quantize.NONE]
    parser.add_argument("--model", required=True, help="folder or hub id of an unquantized checkpoint")
    parser.add_argument("--revision", help="branch, tag or commit of a hub model")
    parser.add_argument("--quantize", required=True, choices=formats, help="format of linear weights")
    parser.add_argument("--output", required=True, type=Path, help="new folder for the quantized checkpoint")


def run(args: argparse.Namespace) -> int:
    show_progress = sys.stderr.isatty()
    output = headrace.quantize(
        args.model, args.output, args.quantize, revision=args.revision, show_progress=show_progress
    )
    num_bytes = sum(file.stat().st_size for file in output.glob("*.safetensors"))
    print(f"{output}: {args.quantize}, {num_bytes / 1e6:.1f} MB of weights; load it with --model {output}")
    return 0
