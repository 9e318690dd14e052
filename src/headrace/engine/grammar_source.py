"""The form asked for, as llguidance reads it."""

import json
import re
from typing import TYPE_CHECKING

import llguidance
from llguidance.gbnf_to_lark import any_to_lark

from headrace.config import StructuredOutputs
from headrace.config.refusals import clipped
from headrace.engine.json_schema import check_json_schema
from headrace.errors import RequestError

if TYPE_CHECKING:
    from llguidance._lib import JsonCompileOptions

MAX_GRAMMAR_PARTS = 1000
"""Rules and brackets: the compiler goes down all of them at once, and its stack ends with the process at about 4000."""

_SCHEMA = re.compile(r"%json\s*")

_JSON_OPTIONS: "JsonCompileOptions" = {
    # One space after a comma or a colon, or none: on one line, as most JSON is sent. Where more is allowed a model that
    # sees no way out of a schema goes on with white space for ever.
    "whitespace_flexible": False,
    "item_separator": ", ?",
    "key_separator": ": ?",
    "lenient": False,
    "coerce_one_of": False,
}


def grammar_source(form: StructuredOutputs) -> str:
    """
    Raises:
        RequestError: a schema or a grammar that llguidance should not be given.
    """
    if form.json_object:
        return _of_schema('{"type":"object"}')
    if form.json is not None:
        check_json_schema(json.loads(form.json))
        return _of_schema(form.json)
    if form.regex is not None:
        return llguidance.LLMatcher.grammar_from_regex(form.regex)
    if form.choice is not None:
        # As one terminal: alternatives of a rule are followed one by one.
        return _of_lark("start: CHOICE\nCHOICE: " + " | ".join(map(_quoted, form.choice)))
    assert form.grammar is not None
    return _of_lark(_checked_lark(form.grammar))


def _quoted(text: str) -> str:
    """A string of Lark, which are JSON's; no control character may be in one as it is."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def _of_schema(text: str) -> str:
    return llguidance.LLMatcher.grammar_from_json_schema(text, overrides=_JSON_OPTIONS)


def _of_lark(text: str) -> str:
    # Spelled out, as a text that looks like JSON would be taken for llguidance's own format.
    return json.dumps({"grammars": [{"lark_grammar": text}]})


def _checked_lark(text: str) -> str:
    _check_parts(text)
    if re.search(r"^\s*root\s*::=", text, re.MULTILINE):
        text = _from_gbnf(text)
        _check_parts(text)
    return text


def _check_parts(text: str) -> None:
    """Of the rules; schemas inside are checked as such."""
    rules = []
    start = 0
    for match in _SCHEMA.finditer(text):
        if match.start() < start:
            continue
        rules.append(text[start : match.start()])
        start = _check_inner_schema(text, match.end())
    num_parts = sum(sum(map(part.count, ":([")) for part in [*rules, text[start:]])
    if num_parts > MAX_GRAMMAR_PARTS:
        raise RequestError(
            f"the grammar has {num_parts} rules and brackets; allowed: up to {MAX_GRAMMAR_PARTS}; give a smaller one"
        )


def _check_inner_schema(text: str, start: int) -> int:
    """Where it ends. Its "x-guidance" is the dialect's way to say how it is to be read, leniently say, and is taken."""
    try:
        schema, end = json.JSONDecoder().raw_decode(text, start)
    except (ValueError, RecursionError):
        raise RequestError(f"the grammar has no JSON schema after %json, at character {start}; give one") from None
    if isinstance(schema, dict):
        guidance = schema.pop("x-guidance", {})
        is_lenient = isinstance(guidance, dict) and guidance.get("lenient") is True
        check_json_schema(schema, is_lenient=is_lenient)
    return end


def _from_gbnf(text: str) -> str:
    try:
        return any_to_lark(text)
    except Exception as error:
        raise RequestError(
            f"the grammar has a rule 'root ::=', but is not GBNF that can be converted ({clipped(error)}); "
            "write it in llguidance's dialect of Lark, with a rule 'start:'"
        ) from None
