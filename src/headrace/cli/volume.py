"""`headrace volume`: the bytes that ranks exchange, as published, by the letter, and by Headrace. No weights needed."""

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from headrace.cli.model_options import add_model_options, engine_config, make_llm
from headrace.cli.terminal import is_watched
from headrace.config import DeviceKind, EngineConfig, Transport
from headrace.costs.exchanges import Layout, rules_of
from headrace.costs.steps import RequestShape
from headrace.errors import ConfigError
from headrace.models.config_file import read_config_file

if TYPE_CHECKING:
    from headrace.parallel.ledger import LedgerRow

_PROMPT_TOKENS, _OUTPUT_TOKENS = 128, 128


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = (
        "Needs a config.json only: --model takes it, its folder, or a hub id. Payload is what a rank hands to a call,\n"
        "wire what it sends for it under the named algorithm, total wire the sum over all ranks. Headers of the\n"
        "transport come on top. docs/communication.md explains each term."
    )
    group = parser.add_argument_group("requests")
    group.add_argument(
        "--prompt", type=int, default=_PROMPT_TOKENS, metavar="S_p", help="prompt tokens (default: %(default)s)"
    )
    group.add_argument(
        "--output", type=int, default=_OUTPUT_TOKENS, metavar="S_d", help="generated tokens (default: %(default)s)"
    )
    group.add_argument(
        "--batch", type=int, default=1, metavar="B", help="such requests, arriving at once (default: %(default)s)"
    )
    parser.add_argument(
        "--plot",
        type=Path,
        metavar="FILE",
        help="draw volume against prompt length and number of ranks, as .png, .svg or .pdf",
    )
    parser.add_argument(
        "--measure",
        action="store_true",
        help="load the model, run such requests, and put what the ledgers of its ranks counted beside it",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object, and nothing else")
    add_model_options(parser, with_ranks=True)


def run(args: argparse.Namespace) -> int:
    from headrace.cli.volume_lines import volume_lines
    from headrace.cli.volume_report import VolumeReport

    if args.plot is not None:
        from headrace.cli.plots import check_can_plot

        check_can_plot(args.plot)
    config = engine_config(args, show_progress=False)
    file = read_config_file(config.load.model, config.load.revision)
    report = VolumeReport(
        model_name=args.model or "demo",
        dtype=file.activation_dtype(config.load.dtype),
        layout=Layout(
            model=file.model,
            parallel=config.parallel,
            activation_bytes=file.activation_bytes(config.load.dtype),
            rules=rules_of(_transport(config)),
        ),
        request=_request(args, config),
        max_num_batched_tokens=config.scheduler.max_num_batched_tokens,
    )
    if args.measure:
        report = replace(report, counted=_measure(args, report.request))
    if args.plot is not None:
        from headrace.cli.volume_plot import plot

        plot(report, args.plot)
    print(json.dumps(report.to_json()) if args.json else "\n".join(volume_lines(report)))
    return 0


def _transport(config: EngineConfig) -> Transport:
    """Without a look at the machine: `auto` is what CPUs use, unless GPUs are asked for."""
    if config.parallel.transport is Transport.AUTO and config.device.kind is DeviceKind.CUDA:
        return Transport.NCCL
    return config.parallel.transport


def _measure(args: argparse.Namespace, request: RequestShape) -> "list[list[LedgerRow]]":
    """The ledgers of all ranks after these requests, rank 0 first."""
    from headrace.config import SamplingParams
    from headrace.engine.ranked_executor import RankedExecutor

    # What a prompt shares with another is not computed, and so not exchanged.
    args.enable_prefix_caching = False
    with make_llm(args, show_progress=is_watched() and not args.json, require_tokenizer=False) as llm:
        executor, vocab_size = llm.engine.model.executor, llm.engine.model.config.vocab_size
        prompts = [
            {"prompt_token_ids": [(start + i) % vocab_size for i in range(request.prompt_tokens)]}
            for start in range(request.batch_size)
        ]
        llm.generate(prompts, SamplingParams(temperature=0, max_tokens=request.output_tokens, ignore_eos=True))
        return executor.ledger_rows() if isinstance(executor, RankedExecutor) else [[]]


def _request(args: argparse.Namespace, config: EngineConfig) -> RequestShape:
    for name in ("prompt", "output", "batch"):
        if getattr(args, name) < 1:
            raise ConfigError(f"--{name} is {getattr(args, name)}; it must be at least 1")
    if args.batch > config.scheduler.max_num_seqs:
        raise ConfigError(
            f"--batch is {args.batch}, but --max-num-seqs is {config.scheduler.max_num_seqs}: requests that wait for "
            f"others are not predicted; give --max-num-seqs {args.batch} or more"
        )
    return RequestShape(prompt_tokens=args.prompt, output_tokens=args.output, batch_size=args.batch)
