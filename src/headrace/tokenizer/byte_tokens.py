"""Byte tokens: how SentencePiece-style vocabularies spell what they have no piece for, one token `<0xE4>` per byte."""

from collections.abc import Iterator, Sequence
from itertools import groupby

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_SPACE = "\N{LOWER ONE EIGHTH BLOCK}"
"""How pieces spell a space."""


def byte_of(token: str) -> int | None:
    """The byte that `<0xE4>` stands for; None for any other token."""
    if len(token) != 6 or not token.startswith("<0x") or not token.endswith(">"):
        return None
    try:
        return int(token[3:5], 16)
    except ValueError:
        return None


def token_bytes(token: str) -> bytes:
    """What a piece adds in the middle of a text."""
    byte = byte_of(token)
    return token.replace(_SPACE, " ").encode() if byte is None else bytes([byte])


def replace_invalid_bytes(tokens: Sequence[str]) -> list[str]:
    """Put U+FFFD in place of byte tokens that spell no UTF-8, one for each maximal invalid part.

    Decoders disagree about a run of byte tokens with one bad byte among good ones (some replace the whole run, so that
    text already shown would change). After this, every run left is valid, and text decoded so far only ever grows.
    """
    replaced: list[str] = []
    for is_byte, run in groupby(tokens, key=lambda token: byte_of(token) is not None):
        tokens_of_run = list(run)
        replaced.extend(_replace_in_run(tokens_of_run) if is_byte else tokens_of_run)
    return replaced


def _replace_in_run(run: list[str]) -> Iterator[str]:
    data = bytes(byte for token in run if (byte := byte_of(token)) is not None)
    start = 0
    while start < len(data):
        try:
            data[start:].decode("utf-8")
        except UnicodeDecodeError as error:
            yield from run[start : start + error.start]
            yield REPLACEMENT
            start += error.end
        else:
            yield from run[start:]
            return
