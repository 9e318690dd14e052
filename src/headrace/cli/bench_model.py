"""`headrace bench model`: measure a model, and the machine under it."""

import argparse
import json

from headrace.cli.bench_options import ProtocolDefaults, add_protocol_options, check_positive, resolve_settings
from headrace.cli.model_options import add_model_options, make_llm
from headrace.cli.parallel_options import parallel_settings
from headrace.cli.progress_line import progress_line
from headrace.cli.terminal import is_watched
from headrace.config.settings import parallel_config
from headrace.demo_model import DEMO

_DEFAULTS = ProtocolDefaults(
    prefill_tokens=(512,), decode_tokens=48, context_lens=(512,), batch_sizes=(1, 4, 8, 16, 32), rounds=3
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = (
        "Each figure is the best of several rounds. Prefill: one prompt of random tokens. Decode: single steps from\n"
        "that context. Batched decode: 12 steps of several sequences from a context of 8. Limits are measured in the\n"
        "same run: a floor is the time the machine needs to read the weights (and cached keys and values) once, or\n"
        "to do the multiplications; the share says how close the figure came to it."
    )
    add_protocol_options(parser, _DEFAULTS)
    add_model_options(parser, with_ranks=True)


def run(args: argparse.Namespace) -> int:
    check_positive(args)
    # From here on torch is needed.
    from headrace.bench.limits import measure_limits
    from headrace.bench.machine import peak_bytes
    from headrace.bench.model import measure_speed
    from headrace.cli.bench_report import BenchReport, table

    is_silent = args.json or args.quiet
    llm = make_llm(args, show_progress=is_watched() and not is_silent, require_tokenizer=False)
    engine = llm.engine
    settings, remarks = resolve_settings(args, _DEFAULTS, engine.model.plan)
    with progress_line(is_shown=not is_silent) as on_start:
        speed = measure_speed(engine, settings, on_start)
        peak_memory_bytes = peak_bytes(engine.model.kernels.device)
        # Of the machine, not of one rank's share of it.
        num_threads = engine.model.plan.num_threads * engine.model.num_ranks_on_host
        engine.model.kernels.set_num_threads(num_threads)
        limits = measure_limits(engine.model.kernels, engine.model.formats, num_threads, on_start)
    report = BenchReport(
        model_name=args.model or DEMO,
        model=engine.model,
        settings=settings,
        speed=speed,
        limits=limits,
        peak_memory_bytes=peak_memory_bytes,
        num_threads=args.num_threads,
        remarks=tuple(remarks),
        parallel=parallel_config(**parallel_settings(args)),
    )
    if args.json:
        print(json.dumps(report.to_json(), allow_nan=False))
    else:
        print("\n".join(table(report)))
    return 0
