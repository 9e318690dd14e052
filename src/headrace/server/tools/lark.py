"""Pieces of grammars in llguidance's dialect of Lark."""

import json
from collections.abc import Mapping
from typing import Any, Protocol

from headrace.server.tools.loose_schema import loosened

_ONE_LINE = {"whitespace_flexible": False, "item_separator": ", ?", "key_separator": ": ?"}
"""As models were trained to write calls. Where more white space is allowed, models get lost in it."""


class TokenNames(Protocol):
    """What a grammar has to know of a tokenizer; `headrace.tokenizer.Tokenizer` is one."""

    def token_to_id(self, token: str) -> int | None: ...


def literal(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def json_schema(schema: Mapping[str, Any], *, is_exact: bool) -> str:
    """JSON of a schema; is_exact: what cannot be enforced is refused when it is compiled, rather than left out."""
    plain = {key: value for key, value in schema.items() if key != "x-guidance"} if is_exact else loosened(schema)
    return "%json " + json.dumps({"x-guidance": _ONE_LINE, **plain}, ensure_ascii=False)


def tag(text: str, tokenizer: TokenNames) -> str:
    """A tag as the one token that the vocabulary has for it, as models were trained to write it; else as text."""
    token_id = tokenizer.token_to_id(text)
    return literal(text) if token_id is None else f"<[{token_id}]>"
