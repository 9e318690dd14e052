"""Options of how tokens are chosen and when an output ends."""

import argparse
from typing import Any

from headrace.cli.option_values import given_of, parse_bias, parse_max_tokens
from headrace.config import SamplingParams

_SAMPLING_SETTINGS = (
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "stop",
    "min_tokens",
    "ignore_eos",
    "n",
    "seed",
    "logprobs",
)


def add_sampling_options(parser: argparse.ArgumentParser, *, max_tokens: int | None) -> None:
    """How tokens are chosen and when an output ends; max_tokens: this command's default, None is no limit."""
    group = parser.add_argument_group("sampling", "defaults are what the model's generation_config.json recommends")
    group.add_argument("--temperature", type=float, metavar="T", help="0 always takes the most likely token")
    group.add_argument("--top-k", type=int, metavar="K", help="keep the K most likely tokens; 0 keeps all")
    group.add_argument("--top-p", type=float, metavar="P", help="keep the most likely tokens that sum to P")
    group.add_argument("--min-p", type=float, metavar="P", help="drop tokens below P times the most likely one")
    group.add_argument("--repetition-penalty", type=float, metavar="R", help="above 1 avoids tokens seen before")
    group.add_argument("--presence-penalty", type=float, metavar="X", help="-2 to 2, once per token in the output")
    group.add_argument("--frequency-penalty", type=float, metavar="X", help="-2 to 2, for each time in the output")
    group.add_argument(
        "--logit-bias",
        type=parse_bias,
        action="append",
        metavar="ID=BIAS",
        help="add BIAS (-100 to 100) to the logit of token ID; repeatable",
    )
    group.add_argument("--stop", action="append", metavar="TEXT", help="end the output before TEXT; repeatable")
    group.add_argument(
        "--max-tokens",
        type=parse_max_tokens,
        default=max_tokens,
        metavar="N",
        help="output tokens at most; 'none' goes up to the model's length, where every output ends "
        f"(default: {max_tokens or 'none'})",
    )
    group.add_argument("--min-tokens", type=int, metavar="N", help="output tokens at least")
    group.add_argument("--ignore-eos", action="store_true", default=None, help="go on after an end-of-sequence token")
    group.add_argument("--seed", type=int, metavar="N", help="makes the same call give the same text")


def sampling_changes(args: argparse.Namespace) -> dict[str, Any]:
    """The sampling settings that were given, checked before any time goes into loading a model.

    Raises:
        RequestError: a value outside its range.
    """
    changes = given_of(args, _SAMPLING_SETTINGS) | {"max_tokens": args.max_tokens}
    if args.logit_bias:
        changes["logit_bias"] = dict(args.logit_bias)
    SamplingParams.from_mapping(changes)
    return changes
