"""What is written behind an option, read; and what of it was given."""

import argparse
import re
from collections.abc import Iterable
from enum import Enum
from typing import Any

_BYTE_UNITS = {"": 1, "B": 1}
_BYTE_UNITS |= {f"{prefix}B": 1000**power for power, prefix in enumerate("KMGT", start=1)}
_BYTE_UNITS |= {f"{prefix}iB": 1024**power for power, prefix in enumerate("KMGT", start=1)}


def parse_bytes(text: str) -> int:
    """512MiB, 1.5GB, 1073741824: a number and its unit, decimal (MB) or binary (MiB)."""
    match = re.fullmatch(r"(\d{1,18}(?:\.\d{1,9})?) ?([A-Za-z]*)", text.strip(), re.ASCII)
    units = {name.lower(): factor for name, factor in _BYTE_UNITS.items()}
    if match is None or match[2].lower() not in units:
        raise argparse.ArgumentTypeError(f"'{text}' is not a size; write 512MiB, 2GiB, 1.5GB or a number of bytes")
    return (
        int(float(match[1]) * units[match[2].lower()]) if "." in match[1] else int(match[1]) * units[match[2].lower()]
    )


def parse_max_tokens(text: str) -> int | None:
    """A number of tokens, or `none` for as many as the model's length allows."""
    if text.lower() == "none":
        return None
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"'{text[:80]}' is neither a number of tokens nor 'none'") from None


def parse_step_s(text: str) -> float | None:
    """A number of seconds, or `none` for no limit."""
    if text.lower() == "none":
        return None
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"'{text[:80]}' is neither a number of seconds nor 'none'") from None


def parse_bias(text: str) -> tuple[int, float]:
    """ID=BIAS, such as 13=-100."""
    token_id, _, bias = text.partition("=")
    try:
        return int(token_id), float(bias)
    except ValueError:
        raise argparse.ArgumentTypeError(f"'{text}' is not ID=BIAS; write 13=-100 for token 13") from None


def parse_layer_counts(text: str) -> tuple[int, ...]:
    """Numbers of layers separated by commas."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"'{text[:80]}' is not a list of layer counts; write 10,12") from None


def parse_token_ids(text: str) -> list[int]:
    """Token ids separated by commas."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"'{text[:80]}' is not a list of token ids; write 1,2,3") from None


def given_of(args: argparse.Namespace, names: Iterable[str]) -> dict[str, Any]:
    """What was given on the command line; the rest keeps the defaults of its dataclass."""
    return {name: value for name in names if (value := getattr(args, name, None)) is not None}


def words_of(kind: type[Enum]) -> list[str]:
    return [member.value for member in kind]
