"""Reads the files beside a tokenizer: tokenizer_config.json, special_tokens_map.json, added tokens."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from headrace.errors import CheckpointError

NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")


@dataclass(frozen=True, kw_only=True)
class AddedToken:
    """A token beside the vocabulary; special ones are left out of the text on request."""

    content: str
    is_special: bool = True
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False
    normalized: bool = False


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    """What tokenizer_config.json, special_tokens_map.json and added_tokens.json say.

    named_tokens: bos_token, eos_token, ... as text, for chat templates and for special ids.
    extra_tokens: additional special tokens that have no name.
    added_tokens: by id.
    add_bos_token, add_eos_token: None where the file does not say.
    """

    tokenizer_class: str = ""
    named_tokens: Mapping[str, str] = field(default_factory=dict)
    extra_tokens: tuple[str, ...] = ()
    added_tokens: Mapping[int, AddedToken] = field(default_factory=dict)
    add_bos_token: bool | None = None
    add_eos_token: bool | None = None
    is_legacy: bool = True

    @classmethod
    def from_folder(cls, folder: Path) -> "TokenizerConfig":
        """Read what is there; missing files mean defaults.

        Raises:
            CheckpointError: a file is not JSON, or not an object.
        """
        config = read_json_object(folder / "tokenizer_config.json")
        said = {name: value for name, value in config.items() if value is not None}
        special = read_json_object(folder / "special_tokens_map.json") | said
        return cls(
            tokenizer_class=str(config.get("tokenizer_class") or ""),
            named_tokens={name: text for name in NAMED_TOKENS if (text := token_text(special.get(name)))},
            extra_tokens=_extra_tokens(special),
            added_tokens=_added_tokens(config, read_json_object(folder / "added_tokens.json")),
            add_bos_token=config.get("add_bos_token"),
            add_eos_token=config.get("add_eos_token"),
            is_legacy=config.get("legacy") is not False,
        )


def token_text(token: Any) -> str:
    """The text of a token written as a string or as an object with `content`; "" for anything else."""
    if isinstance(token, Mapping):
        token = token.get("content")
    return token if isinstance(token, str) else ""


def read_json_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file, empty if there is no file.

    Raises:
        CheckpointError: the file cannot be read, is not JSON, or is not an object.
    """
    if not path.exists():
        return {}
    try:
        value = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON ({error}); download the file again") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a JSON {type(value).__name__}; expected an object")
    return value


def _extra_tokens(special: Mapping[str, Any]) -> tuple[str, ...]:
    """A list of tokens, or in some versions of transformers an object of named ones."""
    tokens = special.get("additional_special_tokens") or special.get("extra_special_tokens") or ()
    tokens = tokens.values() if isinstance(tokens, Mapping) else tokens
    if not isinstance(tokens, Iterable):
        raise CheckpointError(f"the tokenizer's additional_special_tokens are {tokens!r:.80}; expected a list")
    return tuple(text for token in tokens if (text := token_text(token)))


def _added_tokens(config: Mapping[str, Any], by_text: Mapping[str, Any]) -> dict[int, AddedToken]:
    """added_tokens_decoder {id: token} of tokenizer_config.json, and the older added_tokens.json {text: id}."""
    tokens = {
        int(token_id): AddedToken(content=text, is_special=False)
        for text, token_id in by_text.items()
        if isinstance(token_id, int)
    }
    decoder = config.get("added_tokens_decoder") or {}
    if not isinstance(decoder, Mapping):
        raise CheckpointError(f"the tokenizer's added_tokens_decoder is {decoder!r:.80}; expected an object")
    for token_id, token in decoder.items():
        if token_text(token) and str(token_id).isdecimal():
            tokens[int(token_id)] = _added_token(token)
    return tokens


def _added_token(token: Any) -> AddedToken:
    flags = token if isinstance(token, Mapping) else {}
    return AddedToken(
        content=token_text(token),
        is_special=bool(flags.get("special", True)),
        lstrip=bool(flags.get("lstrip")),
        rstrip=bool(flags.get("rstrip")),
        single_word=bool(flags.get("single_word")),
        normalized=bool(flags.get("normalized")),
    )
