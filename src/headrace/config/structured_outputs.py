"""What form an output must have. Names are those of vLLM's `StructuredOutputsParams`."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Self

from headrace.config.refusals import clipped, refusal, shown
from headrace.errors import RequestError, nearest_name

_PARAM = "structured_outputs"

MAX_GRAMMAR_BYTES = 128 * 1024
"""Of a schema, of all choices together, or of a grammar, as UTF-8."""

MAX_REGEX_BYTES = 8 * 1024
"""Of a regular expression, or of one choice."""

MAX_CHOICES = 10_000


@dataclass(frozen=True, kw_only=True)
class StructuredOutputs:
    """The form of an output: exactly one of these.

    json: the output is JSON of this schema, given as a mapping or as JSON text; kept as JSON text.
    regex: the whole output matches this regular expression (the syntax of Rust's `regex`, without look-around).
    choice: the output is one of these strings.
    grammar: a context-free grammar with a rule `start`, in llguidance's dialect of Lark; one with a rule `root` is read
        as llama.cpp's GBNF.
    json_object: true: the output is a JSON object of whatever content.

    Raises:
        RequestError: none of them or several, of the wrong type, empty, or too large. What the form means is checked
            where it is compiled.
    """

    json: str | None = None
    regex: str | None = None
    choice: tuple[str, ...] | None = None
    grammar: str | None = None
    json_object: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.json_object, bool):
            raise refusal("json_object of structured_outputs", self.json_object, "true or false", param=_PARAM)
        given = [f.name for f in fields(self) if getattr(self, f.name) not in (None, False)]
        if len(given) != 1:
            found = " and ".join(given) if given else "none of them"
            raise RequestError(
                f"structured_outputs has {found}; give exactly one of json, regex, choice, grammar and json_object"
            )
        if self.json is not None:
            self._set("json", _checked_schema(self.json))
        if self.regex is not None:
            self._set("regex", _checked_text("regex", self.regex, MAX_REGEX_BYTES))
        if self.choice is not None:
            self._set("choice", _checked_choice(self.choice))
        if self.grammar is not None:
            self._set("grammar", _checked_text("grammar", self.grammar, MAX_GRAMMAR_BYTES))

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)

    @property
    def is_json(self) -> bool:
        return self.json is not None or self.json_object

    def to_mapping(self) -> dict[str, Any]:
        """Plain data, fit for JSON. `from_mapping` reads it back."""
        [(name, value)] = [(f.name, v) for f in fields(self) if (v := getattr(self, f.name)) not in (None, False)]
        return {name: list(value) if name == "choice" else value}

    @classmethod
    def from_mapping(cls, given: Mapping[str, Any]) -> Self:
        """
        Raises:
            RequestError: an unknown name, with the nearest known one; or a value that cannot be used.
        """
        if not isinstance(given, Mapping):
            raise refusal(
                "structured_outputs", given, "a mapping with one of json, regex, choice, grammar, json_object"
            )
        known = [f.name for f in fields(cls)]
        for name in given:
            if name not in known:
                raise RequestError(f"structured_outputs has no {shown(name)}; {nearest_name(clipped(name), known)}")
        return cls(**given)


def checked_structured_outputs(given: object) -> StructuredOutputs | None:
    """The object itself, or the one that a mapping describes.

    Raises:
        RequestError: anything else.
    """
    if given is None or isinstance(given, StructuredOutputs):
        return given
    if isinstance(given, Mapping):
        return StructuredOutputs.from_mapping(given)
    raise refusal("structured_outputs", given, "StructuredOutputs(...), a mapping of its fields, or none")


def _checked_schema(given: object) -> str:
    allowed = "a JSON schema: an object, or the JSON text of one"
    try:
        schema = json.loads(_checked_text("json", given, MAX_GRAMMAR_BYTES)) if isinstance(given, str) else given
        if not isinstance(schema, Mapping):
            raise refusal("json of structured_outputs", given, allowed, param=_PARAM)
        # Strict: NaN is no JSON, and a key that is no string would be another one.
        text = json.dumps(_as_dicts(schema), ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    except RecursionError:
        raise RequestError("json of structured_outputs is nested too deeply; make the schema flatter") from None
    except (TypeError, ValueError) as error:
        raise RequestError(
            f"json of structured_outputs is not a JSON schema ({clipped(error)}); give {allowed}"
        ) from None
    return _checked_text("json", text, MAX_GRAMMAR_BYTES)


def _as_dicts(value: object) -> object:
    """Plain dicts and lists, for mappings and sequences of any kind."""
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise TypeError(f"a key is {shown(key)}, not a string")
        return {key: _as_dicts(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str | bytes | bytearray):
        return [_as_dicts(item) for item in value]
    return value


def _checked_choice(given: object) -> tuple[str, ...]:
    if not isinstance(given, Sequence) or isinstance(given, str | bytes | bytearray) or not given:
        raise refusal("choice of structured_outputs", given, "a list of at least one string", param=_PARAM)
    if len(given) > MAX_CHOICES:
        raise RequestError(f"choice of structured_outputs has {len(given)} strings; allowed: up to {MAX_CHOICES}")
    choices = tuple(_checked_text("a string of choice", text, MAX_REGEX_BYTES) for text in given)
    num_bytes = sum(len(text.encode()) for text in choices)
    if num_bytes > MAX_GRAMMAR_BYTES:
        raise _too_large("choice", num_bytes, MAX_GRAMMAR_BYTES)
    return choices


def _checked_text(name: str, given: object, max_bytes: int) -> str:
    if not isinstance(given, str) or not given:
        raise refusal(f"{name} of structured_outputs", given, "a string of at least one character", param=_PARAM)
    try:
        num_bytes = len(given.encode())
    except UnicodeEncodeError as error:
        raise RequestError(
            f"{name} of structured_outputs is not valid Unicode: a lone surrogate at character {error.start}; "
            "give whole characters"
        ) from None
    if num_bytes > max_bytes:
        raise _too_large(name, num_bytes, max_bytes)
    return given


def _too_large(name: str, num_bytes: int, max_bytes: int) -> RequestError:
    return RequestError(f"{name} of structured_outputs has {num_bytes} bytes; allowed: up to {max_bytes}")
