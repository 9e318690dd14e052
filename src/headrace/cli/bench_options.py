"""The protocol that benchmarks of a loaded model share: its options, and what of it a model can hold."""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from headrace.errors import ConfigError

if TYPE_CHECKING:
    from headrace.bench.model import BenchSettings
    from headrace.engine.engine_plan import EnginePlan


@dataclass(frozen=True, kw_only=True)
class ProtocolDefaults:
    """prefill_tokens: empty for a benchmark that measures no prefill, and has no option for it."""

    prefill_tokens: tuple[int, ...] = ()
    decode_tokens: int
    context_lens: tuple[int, ...]
    batch_sizes: tuple[int, ...]
    rounds: int


def add_protocol_options(parser: argparse.ArgumentParser, defaults: ProtocolDefaults) -> None:
    group = parser.add_argument_group("protocol")
    if defaults.prefill_tokens:
        group.add_argument(
            "--prefill-tokens",
            type=int,
            nargs="+",
            metavar="N",
            help=f"prompt lengths (default: {_listed(defaults.prefill_tokens)})",
        )
    group.add_argument(
        "--decode-tokens",
        type=int,
        metavar="N",
        help=f"steps to decode from each context (default: {defaults.decode_tokens})",
    )
    group.add_argument(
        "--context-lens",
        type=int,
        nargs="*",
        metavar="N",
        help=f"contexts to decode from (default: {_listed(defaults.context_lens)})",
    )
    group.add_argument(
        "--batch-sizes",
        type=int,
        nargs="*",
        metavar="N",
        help=f"sequences decoded together (default: {_listed(defaults.batch_sizes)})",
    )
    group.add_argument(
        "--rounds",
        type=int,
        default=defaults.rounds,
        metavar="N",
        help="rounds, of which the best counts (default: %(default)s)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object, and nothing else")
    parser.add_argument("--quiet", action="store_true", help="show no progress")


def check_positive(args: argparse.Namespace) -> None:
    """Before a model is loaded.

    Raises:
        ConfigError: a number below 1.
    """
    for name in ("prefill_tokens", "decode_tokens", "context_lens", "batch_sizes", "rounds"):
        value: Any = getattr(args, name, None)
        for number in value if isinstance(value, list) else [value]:
            if number is not None and number < 1:
                raise ConfigError(f"--{name.replace('_', '-')} is {number}; it must be at least 1")


def check_left_out(args: argparse.Namespace, defaults: Mapping[str, Any], why: str) -> None:
    """Options that a command sets itself are refused, not overruled.

    Raises:
        ConfigError: one was given another value than its default.
    """
    for name, default in defaults.items():
        if getattr(args, name) != default:
            raise ConfigError(f"--{name.replace('_', '-')} is '{getattr(args, name)}'; leave it out, {why}")


def resolve_settings(
    args: argparse.Namespace,
    defaults: ProtocolDefaults,
    plan: "EnginePlan",
    *,
    num_turns: int = 1,
    num_untimed_steps: int = 0,
) -> "tuple[BenchSettings, list[str]]":
    """What was asked for, as it was; defaults shortened to what the model can hold, with a remark for each.

    num_turns: how often a sequence is decoded for so many tokens; num_untimed_steps: before each time.

    Raises:
        ConfigError: something asked for does not fit the model.
    """
    from headrace.bench.model import BATCH_CONTEXT_LEN, BATCH_STEPS, BenchSettings

    remarks: list[str] = []
    max_len = plan.max_model_len
    least = BATCH_CONTEXT_LEN + max(BATCH_STEPS, num_turns * (1 + num_untimed_steps)) + 2
    if max_len < least:
        raise ConfigError(f"max_model_len is {max_len}; the benchmark needs {least}")
    decode_tokens = args.decode_tokens or min(
        defaults.decode_tokens, max(1, max_len // (2 * num_turns) - num_untimed_steps)
    )
    # Prefill makes one token, and a sequence that reaches max_model_len ends: the last step must stay below it.
    longest = max_len - num_turns * (num_untimed_steps + decode_tokens) - 2

    def lengths(option: str, wanted: tuple[int, ...]) -> tuple[int, ...]:
        given = getattr(args, option[2:].replace("-", "_"), None)
        return _lengths(option, given, wanted, longest, max_len, remarks)

    settings = BenchSettings(
        decode_tokens=decode_tokens,
        prefill_tokens=lengths("--prefill-tokens", defaults.prefill_tokens),
        context_lens=lengths("--context-lens", defaults.context_lens),
        batch_sizes=_batch_sizes(args.batch_sizes, defaults.batch_sizes, plan, remarks),
        num_rounds=args.rounds,
    )
    return settings, remarks


def _lengths(
    option: str,
    given: Sequence[int] | None,
    defaults: tuple[int, ...],
    longest: int,
    max_len: int,
    remarks: list[str],
) -> tuple[int, ...]:
    wanted = defaults if given is None else tuple(given)
    if not wanted or max(wanted) <= longest:
        return tuple(dict.fromkeys(wanted))
    if longest < 1 or given is not None:
        hint = f"give at most {longest}, or fewer --decode-tokens" if longest >= 1 else "give fewer --decode-tokens"
        raise ConfigError(f"{option} {max(wanted)} and the decoded tokens do not fit max_model_len {max_len}; {hint}")
    remarks += [
        f"{option} is {longest} instead of {length}: the model's length is {max_len}"
        for length in defaults
        if length > longest
    ]
    return tuple(dict.fromkeys(min(length, longest) for length in defaults))


def _batch_sizes(
    given: Sequence[int] | None, defaults: tuple[int, ...], plan: "EnginePlan", remarks: list[str]
) -> tuple[int, ...]:
    largest = plan.scheduler.max_num_seqs
    if given:
        if max(given) > largest:
            raise ConfigError(f"--batch-sizes {max(given)} is above --max-num-seqs, which is {largest}; raise that too")
        return tuple(dict.fromkeys(given))
    if given is not None:
        return ()
    if max(defaults) > largest:
        remarks.append(f"--batch-sizes stop at --max-num-seqs, which is {largest}")
    return tuple(size for size in defaults if size <= largest)


def _listed(numbers: Sequence[int]) -> str:
    return " ".join(map(str, numbers))
