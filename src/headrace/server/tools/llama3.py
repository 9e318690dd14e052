"""Llama 3.1 and 3.2: the whole answer is {"name": ..., "parameters": {...}}, or several with ";" between them.

<|python_tag|> may stand before them, and only with it may text. An answer in JSON that has other keys is content.
"""

from collections.abc import Sequence

from headrace.server.tools.definitions import FunctionTool
from headrace.server.tools.json_calls import JsonCallParser
from headrace.server.tools.json_grammar import free_schema, json_call
from headrace.server.tools.lark import TokenNames, tag
from headrace.server.tools.parser import Reading

_TAG = "<|python_tag|>"


class Llama3Parser(JsonCallParser):
    def _read(self) -> Reading[None]:
        self._next = yield
        yield from self._spaces()
        yield from self._calls()
        self._give_back()
        while self._next:
            if self._next != "<":
                yield from self._content()
            elif (yield from self._literal(_TAG)):
                yield from self._calls()
            self._give_back()

    def _calls(self) -> Reading[None]:
        """Read calls for as long as there are some; what follows them is left in `taken`."""
        yield from self._spaces()
        while self._next == "{" and (yield from self._call_object(needs_arguments=True)):
            yield from self._spaces()
            if self._next == ";":
                yield from self._advance()
            yield from self._spaces()
            if not self._next:
                self._drop()


class Llama3Format:
    name = "llama3"

    def make_parser(self, tools: Sequence[FunctionTool]) -> Llama3Parser:
        del tools  # JSON says itself what its values are
        return Llama3Parser()

    def forced_grammar(self, tools: Sequence[FunctionTool], tokenizer: TokenNames, *, is_single: bool) -> str:
        del tokenizer
        return "\n".join(["%llguidance {}", "start: calls", *_rules(tools, is_single, is_forced=True)])

    def free_grammar(self, tools: Sequence[FunctionTool], tokenizer: TokenNames, *, is_single: bool) -> str:
        """An answer that begins with a brace is a call."""
        text = r"/([ \t\r\n]*([^{ \t\r\n](?s:.*))?)/ & ~/(?s:.*)<\|python_tag\|>(?s:.*)/"
        start = f"start: {tag(_TAG, tokenizer)}? calls | TEXT"
        return "\n".join(["%llguidance {}", start, f"TEXT: {text}", *_rules(tools, is_single, is_forced=False)])


def _rules(tools: Sequence[FunctionTool], is_single: bool, is_forced: bool) -> list[str]:
    names = " | ".join(f"call_{number}" for number in range(len(tools)))
    return [
        "calls: call" if is_single else 'calls: call ("; " call)*',
        f"call: {names}",
        *(
            f"call_{number}: {json_call(tool, 'parameters', tool.schema if is_forced else free_schema(tool))}"
            for number, tool in enumerate(tools)
        ),
    ]
