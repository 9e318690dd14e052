"""Qwen3-Coder: text, and calls in tags of their own.

    <tool_call>
    <function=NAME>
    <parameter=KEY>
    VALUE
    </parameter>
    </function>
    </tool_call>

A value is bare text between the two line breaks; the function's schema says what it is. Strings are given as they come,
other values once they are complete.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from headrace.server.tools.definitions import FunctionTool
from headrace.server.tools.deltas import new_call_id
from headrace.server.tools.lark import TokenNames
from headrace.server.tools.parser import Reading, TaggedParser
from headrace.server.tools.schema_types import STRING, allowed_types, argument_schema, value_as_json
from headrace.server.tools.tagged_grammar import forced, free
from headrace.server.tools.xml_grammar import any_call, xml_call

_NOT_IN_NAMES = frozenset("<\n")
_VALUE_ENDS = ("\n</parameter>", "</parameter>")


class QwenParser(TaggedParser):
    """parameters: each known function's JSON schema, by name; values of unknown ones are of any type."""

    def __init__(self, parameters: Mapping[str, Mapping[str, Any]], make_id: Callable[[], str] = new_call_id) -> None:
        self._parameters = parameters
        super().__init__(make_id)

    def _call(self) -> Reading[bool]:
        yield from self._spaces()
        if not (yield from self._literal("<function=")):
            return False
        name = yield from self._until(">", _NOT_IN_NAMES)
        if not name:
            return False
        separator = "{"
        while True:
            key = yield from self._parameter_key()
            is_end = key is None and (yield from self._literal("/function>"))
            if key is None and not is_end:
                if separator == "{":
                    return False
                is_end = yield from self._literal("tool_call>")  # models forget to close the function
            if separator == "{":
                self._out.begin_call(name)
            if key is None:
                yield from self._end_call(separator, is_end)
                return True
            self._drop()
            self._out.arguments(f"{separator}{json.dumps(key, ensure_ascii=False)}: ")
            separator = ", "
            yield from self._value(name, key)

    def _parameter_key(self) -> Reading[str | None]:
        """The key of the parameter that begins here; None, with "<" read, if something else does."""
        yield from self._spaces()
        if not (yield from self._literal("<")) or self._next == "/":
            return None
        if not (yield from self._literal("parameter=")):
            return None
        return (yield from self._until(">", _NOT_IN_NAMES))

    def _end_call(self, separator: str, is_end: bool) -> Reading[None]:
        """Close the arguments, unless the text has ended and they were cut off."""
        if is_end or self._next:
            self._out.arguments("{}" if separator == "{" else "}")
        if self._next and not is_end:
            self._give_back()
        yield from self._spaces()
        self._drop()

    def _value(self, name: str, key: str) -> Reading[None]:
        if self._next == "\n":
            yield from self._advance()
        root = self._parameters.get(name, {})
        types = allowed_types(argument_schema(root, key), root)
        if types == STRING:
            self._out.arguments('"')
            is_end = yield from self._copy_text(lambda text: self._out.arguments(_escaped(text)))
            self._out.arguments('"' if is_end else "")
        else:
            pieces: list[str] = []
            is_end = yield from self._copy_text(pieces.append)
            text = "".join(pieces)
            self._out.arguments(value_as_json(text, types) if is_end else text)
        self._drop()

    def _copy_text(self, emit: Callable[[str], None]) -> Reading[bool]:
        """Give the characters before the value's end to `emit`; False if the text ends within."""
        held = ""  # may be the beginning of the end
        while self._next:
            held += self._next
            yield from self._advance()
            if held in _VALUE_ENDS:
                return True
            while held and not any(end.startswith(held) for end in _VALUE_ENDS):
                emit(held[0])
                held = held[1:]
        return False


def _escaped(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)[1:-1]


class QwenFormat:
    name = "qwen"

    def make_parser(self, tools: Sequence[FunctionTool]) -> QwenParser:
        return QwenParser({tool.name: tool.schema for tool in tools})

    def forced_grammar(self, tools: Sequence[FunctionTool], tokenizer: TokenNames, *, is_single: bool) -> str:
        return forced([xml_call(number, tool) for number, tool in enumerate(tools)], tokenizer, is_single=is_single)

    def free_grammar(self, tools: Sequence[FunctionTool], tokenizer: TokenNames, *, is_single: bool) -> str:
        rules = [(xml_call if tool.strict else any_call)(number, tool) for number, tool in enumerate(tools)]
        return free(rules, tokenizer, is_single=is_single)
