"""Hermes 2 and 3, Qwen2.5, Qwen3: text, and calls as <tool_call>{"name": ..., "arguments": {...}}</tool_call>."""

from headrace.server.tools.json_calls import JsonCallParser
from headrace.server.tools.parser import Reading, TaggedParser


class HermesParser(TaggedParser, JsonCallParser):
    def _call(self) -> Reading[bool]:
        yield from self._spaces()
        return (yield from self._call_object(needs_arguments=False))
