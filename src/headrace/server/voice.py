"""What one output of a chat says: text, and the calls of tools that are written in it."""

from typing import Any

from headrace.server.tools import ToolCallParser, parse_whole


class Voice:
    """Turns an output's text into deltas as it comes.

    parser: of tool calls; None where text is only text.
    """

    def __init__(self, parser: ToolCallParser | None) -> None:
        self._parser = parser

    @property
    def num_calls(self) -> int:
        return 0 if self._parser is None else self._parser.num_calls

    def say(self, text: str, *, is_last: bool) -> dict[str, Any]:
        """OpenAI's `delta` for some more text, empty if that makes nothing certain."""
        if self._parser is None:
            return {"content": text} if text else {}
        found = self._parser.finish(text) if is_last else self._parser.feed(text)
        content, calls = found.content, [call.to_mapping() for call in found.tool_calls]
        return ({"content": content} if content else {}) | ({"tool_calls": calls} if calls else {})


def whole_message(text: str, parser: ToolCallParser | None) -> tuple[dict[str, Any], int]:
    """OpenAI's `message` of a whole output, and how many calls it has. With calls and no text `content` is null."""
    message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
    if parser is None:
        return message, 0
    content, calls = parse_whole(parser, text)
    message["content"] = content or (None if calls else "")
    if calls:
        message["tool_calls"] = [call.to_mapping() for call in calls]
    return message, len(calls)
