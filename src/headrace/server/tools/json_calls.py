"""Calls written as JSON objects: {"name": ..., "arguments": {...}}, or "parameters", in any order."""

import json
from abc import ABC
from collections.abc import Callable
from typing import Any

from headrace.server.tools.parser import Reading, ToolCallParser

_ARGUMENT_KEYS = ("arguments", "parameters")
_OTHER_KEYS = ("id", "type")
_PRIMITIVE_ENDS = frozenset(",}] \t\r\n")


class JsonCallParser(ToolCallParser, ABC):
    """Reads one object as a call.

    Arguments that follow the name are given as they come, whatever is between their braces; only control characters in
    strings, which JSON forbids and models write, are escaped. Arguments before the name wait for it, and arguments as a
    string of JSON are unpacked; these must be valid.
    """

    def _call_object(self, *, needs_arguments: bool) -> Reading[bool]:
        """False, with everything in `taken`, if it is not a call; True once its object has ended or broken off."""
        if not (yield from self._literal("{")):
            return False
        name: str | None = None
        held: str | None = None
        while True:
            key = yield from self._key()
            if key == "name" and name is None:
                name = yield from self._string()
                is_read = bool(name)
            elif key in _ARGUMENT_KEYS and held is None:
                if name is not None and self._next == "{":
                    return (yield from self._streamed_call(name))
                held = yield from self._held_value()
                is_read = held is not None
            else:
                is_read = key in _OTHER_KEYS and (yield from self._string()) is not None
            yield from self._spaces()
            if not is_read or self._next not in (",", "}"):
                return False
            is_end = self._next == "}"
            yield from self._advance()
            if is_end:
                return self._whole_call(name, "{}" if held is None and not needs_arguments else held)

    def _streamed_call(self, name: str) -> Reading[bool]:
        self._drop()
        self._out.begin_call(name)
        yield from self._copy_value(self._out.arguments)
        self._drop()
        yield from self._spaces()
        while self._next == ",":  # what else the object says is no part of OpenAI's call
            yield from self._advance()
            if (yield from self._key()) is None or not (yield from self._copy_value(_ignore)):
                self._give_back()
                return True
            self._drop()
            yield from self._spaces()
        yield from self._spaces(_BRACE)  # models write one too few and one too many
        self._drop()
        return True

    def _whole_call(self, name: str | None, held: str | None) -> bool:
        arguments = _unpacked(held)
        if name is None or arguments is None:
            return False
        self._drop()
        self._out.begin_call(name)
        self._out.arguments(arguments)
        return True

    def _key(self) -> Reading[str | None]:
        """A key, the colon and the spaces around them."""
        yield from self._spaces()
        key = yield from self._string()
        yield from self._spaces()
        if not (yield from self._literal(":")):
            return None
        yield from self._spaces()
        return key

    def _string(self) -> Reading[str | None]:
        characters: list[str] = []
        if self._next != '"' or not (yield from self._copy_string(characters.append)):
            return None
        value = loads("".join(characters))
        return value if isinstance(value, str) else None

    def _held_value(self) -> Reading[str | None]:
        characters: list[str] = []
        return "".join(characters) if (yield from self._copy_value(characters.append)) else None

    def _copy_value(self, emit: Callable[[str], None]) -> Reading[bool]:
        """Give the characters of one value to `emit`; False if the text ends within."""
        if self._next == '"':
            return (yield from self._copy_string(emit))
        if self._next not in ("{", "["):
            while self._next and self._next not in _PRIMITIVE_ENDS:
                emit(self._next)
                yield from self._advance()
            return bool(self._next)
        depth = 0
        while self._next:
            if self._next == '"':
                yield from self._copy_string(emit)
                continue
            depth += (self._next in _OPENING) - (self._next in _CLOSING)
            emit(self._next)
            yield from self._advance()
            if not depth:
                return True
        return False

    def _copy_string(self, emit: Callable[[str], None]) -> Reading[bool]:
        is_escaped, is_first = False, True
        while self._next:
            character = self._next
            emit(character if character >= " " else json.dumps(character)[1:-1])
            yield from self._advance()
            if character == '"' and not (is_escaped or is_first):
                return True
            is_escaped, is_first = character == "\\" and not is_escaped, False
        return False


_OPENING, _CLOSING, _BRACE = frozenset("{["), frozenset("}]"), frozenset("}")


def loads(text: str) -> Any:
    """The value of a JSON text, `Ellipsis` if it is none (no JSON value is that)."""
    try:
        return json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        return ...


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _unpacked(held: str | None) -> str | None:
    """The text of an object of arguments, from what the model gave as such; None if it is none."""
    value = ... if held is None else loads(held)
    if value is None:
        return "{}"
    if isinstance(value, str):
        held, value = value, loads(value)
    return held if isinstance(value, dict) else None


def _ignore(_: str) -> None:
    pass
