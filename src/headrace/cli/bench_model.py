"""`headrace bench model`: measure a model, and the machine under it."""

import argparse
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from headrace.cli.options import DEMO, add_model_options, make_llm
from headrace.cli.progress_line import progress_line
from headrace.cli.terminal import is_watched
from headrace.errors import ConfigError

if TYPE_CHECKING:
    from headrace.bench.model import BenchSettings
    from headrace.engine.engine_plan import EnginePlan

_LENGTH = 512
_DECODE_TOKENS = 48
_BATCH_SIZES = (1, 4, 8, 16, 32)
_ROUNDS = 3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = (
        "Each figure is the best of several rounds. Prefill: one prompt of random tokens. Decode: single steps from\n"
        "that context. Batched decode: 12 steps of several sequences from a context of 8. Limits are measured in the\n"
        "same run: a floor is the time the machine needs to read the weights (and cached keys and values) once, or\n"
        "to do the multiplications; the share says how close the figure came to it."
    )
    group = parser.add_argument_group("protocol")
    group.add_argument(
        "--prefill-tokens", type=int, nargs="+", metavar="N", help=f"prompt lengths (default: {_LENGTH})"
    )
    group.add_argument(
        "--decode-tokens", type=int, metavar="N", help=f"steps to decode from each context (default: {_DECODE_TOKENS})"
    )
    group.add_argument(
        "--context-lens", type=int, nargs="+", metavar="N", help=f"contexts to decode from (default: {_LENGTH})"
    )
    group.add_argument(
        "--batch-sizes",
        type=int,
        nargs="+",
        metavar="N",
        help=f"sequences decoded together (default: {' '.join(map(str, _BATCH_SIZES))})",
    )
    group.add_argument(
        "--rounds",
        type=int,
        default=_ROUNDS,
        metavar="N",
        help="rounds, of which the best counts (default: %(default)s)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object, and nothing else")
    parser.add_argument("--quiet", action="store_true", help="show no progress")
    add_model_options(parser)


def run(args: argparse.Namespace) -> int:
    _check_positive(args)
    # From here on torch is needed.
    from headrace.bench.limits import measure_limits
    from headrace.bench.model import measure_speed
    from headrace.cli.bench_report import BenchReport, table
    from headrace.machine import peak_memory_bytes

    is_silent = args.json or args.quiet
    llm = make_llm(args, show_progress=is_watched() and not is_silent, require_tokenizer=False)
    engine = llm.engine
    settings, remarks = resolve_settings(args, engine.model.plan)
    with progress_line(is_shown=not is_silent) as on_start:
        speed = measure_speed(engine, settings, on_start)
        peak_bytes = peak_memory_bytes()
        limits = measure_limits(engine.model.kernels, engine.model.formats, engine.model.plan.num_threads, on_start)
    report = BenchReport(
        model_name=args.model or DEMO,
        model=engine.model,
        settings=settings,
        speed=speed,
        limits=limits,
        peak_memory_bytes=peak_bytes,
        num_threads=args.num_threads,
        remarks=tuple(remarks),
    )
    if args.json:
        print(json.dumps(report.to_json(), allow_nan=False))
    else:
        print("\n".join(table(report)))
    return 0


def resolve_settings(args: argparse.Namespace, plan: "EnginePlan") -> "tuple[BenchSettings, list[str]]":
    """What was asked for, as it was; defaults shortened to what the model can hold, with a remark for each.

    Raises:
        ConfigError: something asked for does not fit the model.
    """
    from headrace.bench.model import BATCH_CONTEXT_LEN, BATCH_STEPS, BenchSettings

    remarks: list[str] = []
    max_len = plan.max_model_len
    if max_len < BATCH_CONTEXT_LEN + BATCH_STEPS + 2:
        raise ConfigError(f"max_model_len is {max_len}; the benchmark needs {BATCH_CONTEXT_LEN + BATCH_STEPS + 2}")
    decode_tokens = args.decode_tokens or min(_DECODE_TOKENS, max_len // 2)
    # Prefill makes one token, and a sequence that reaches max_model_len ends: the last step must stay below it.
    longest = max_len - decode_tokens - 2
    settings = BenchSettings(
        decode_tokens=decode_tokens,
        prefill_tokens=_lengths("--prefill-tokens", args.prefill_tokens, longest, max_len, remarks),
        context_lens=_lengths("--context-lens", args.context_lens, longest, max_len, remarks),
        batch_sizes=_batch_sizes(args.batch_sizes, plan, remarks),
        num_rounds=args.rounds,
    )
    return settings, remarks


def _lengths(
    option: str, given: Sequence[int] | None, longest: int, max_len: int, remarks: list[str]
) -> tuple[int, ...]:
    if given is None:
        if longest >= _LENGTH:
            return (_LENGTH,)
        if longest >= 1:
            remarks.append(f"{option} is {longest} instead of {_LENGTH}: the model's length is {max_len}")
            return (longest,)
    if longest < 1 or max(given or [1]) > longest:
        hint = f"give at most {longest}, or fewer --decode-tokens" if longest >= 1 else "give fewer --decode-tokens"
        raise ConfigError(
            f"{option} {max(given or [_LENGTH])} and the decoded tokens do not fit max_model_len {max_len}; {hint}"
        )
    return tuple(dict.fromkeys(given or ()))


def _batch_sizes(given: Sequence[int] | None, plan: "EnginePlan", remarks: list[str]) -> tuple[int, ...]:
    largest = plan.scheduler.max_num_seqs
    if given is not None and max(given) > largest:
        raise ConfigError(f"--batch-sizes {max(given)} is above --max-num-seqs, which is {largest}; raise that too")
    if given is not None:
        return tuple(dict.fromkeys(given))
    if max(_BATCH_SIZES) > largest:
        remarks.append(f"--batch-sizes stop at --max-num-seqs, which is {largest}")
    return tuple(size for size in _BATCH_SIZES if size <= largest)


def _check_positive(args: argparse.Namespace) -> None:
    for name in ("prefill_tokens", "decode_tokens", "context_lens", "batch_sizes", "rounds"):
        value: Any = getattr(args, name)
        for number in value if isinstance(value, list) else [value]:
            if number is not None and number < 1:
                raise ConfigError(f"--{name.replace('_', '-')} is {number}; it must be at least 1")
