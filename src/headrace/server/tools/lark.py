"""Pieces of grammars in llguidance's dialect of Lark."""

import json
from collections.abc import Mapping
from typing import Any, Protocol

_COMPACT = {"whitespace_flexible": False, "item_separator": ", ?", "key_separator": ": ?"}


class TokenNames(Protocol):
    """What a grammar has to know of a tokenizer; `headrace.tokenizer.Tokenizer` is one."""

    def token_to_id(self, token: str) -> int | None: ...


def literal(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def json_schema(schema: Mapping[str, Any], *, is_exact: bool) -> str:
    """JSON of a schema, on one line: white space without end would be JSON too, and models get lost in it.

    is_exact: what the grammar cannot express is refused when it is compiled; else keywords that it cannot express (an
        unknown `format`, say) are left out.
    """
    guidance = _COMPACT if is_exact else {**_COMPACT, "lenient": True}
    plain = {key: value for key, value in schema.items() if key != "x-guidance"}
    return "%json " + json.dumps({"x-guidance": guidance, **plain}, ensure_ascii=False)


def tag(text: str, tokenizer: TokenNames) -> str:
    """A tag as the one token that the vocabulary has for it, as models were trained to write it; else as text."""
    token_id = tokenizer.token_to_id(text)
    return literal(text) if token_id is None else f"<[{token_id}]>"
