"""Hermes 2 and 3, Qwen2.5, Qwen3: text, and calls as <tool_call>{"name": ..., "arguments": {...}}</tool_call>."""

from collections.abc import Mapping, Sequence
from typing import Any

from headrace.server.tools.definitions import FunctionTool
from headrace.server.tools.json_calls import JsonCallParser
from headrace.server.tools.json_grammar import free_schema, json_call
from headrace.server.tools.lark import TokenNames
from headrace.server.tools.parser import Reading, TaggedParser
from headrace.server.tools.tagged_grammar import forced, free


class HermesParser(TaggedParser, JsonCallParser):
    def _call(self) -> Reading[bool]:
        yield from self._spaces()
        return (yield from self._call_object(needs_arguments=False))


class HermesFormat:
    name = "hermes"

    def make_parser(self, tools: Sequence[FunctionTool]) -> HermesParser:
        del tools  # JSON says itself what its values are
        return HermesParser()

    def forced_grammar(self, tools: Sequence[FunctionTool], tokenizer: TokenNames, *, is_single: bool) -> str:
        rules = [_rule(number, tool, tool.schema) for number, tool in enumerate(tools)]
        return forced(rules, tokenizer, is_single=is_single)

    def free_grammar(self, tools: Sequence[FunctionTool], tokenizer: TokenNames, *, is_single: bool) -> str:
        rules = [_rule(number, tool, free_schema(tool)) for number, tool in enumerate(tools)]
        return free(rules, tokenizer, is_single=is_single)


def _rule(number: int, tool: FunctionTool, schema: Mapping[str, Any]) -> str:
    return f"call_{number}: {json_call(tool, 'arguments', schema)}"
