"""An answer that is not streamed: the same parser, its pieces joined."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from headrace.server.tools.deltas import ToolDelta
from headrace.server.tools.parser import ToolCallParser


@dataclass(frozen=True, kw_only=True)
class ToolCall:
    """arguments: JSON as the model wrote it, so that it may be broken."""

    id: str
    name: str
    arguments: str

    def to_mapping(self) -> dict[str, Any]:
        """An entry of `choices[].message.tool_calls`."""
        return {"id": self.id, "type": "function", "function": {"name": self.name, "arguments": self.arguments}}


def parse_whole(parser: ToolCallParser, text: str) -> tuple[str, tuple[ToolCall, ...]]:
    """Content and calls of a text."""
    return join_deltas([parser.finish(text)])


def join_deltas(deltas: Iterable[ToolDelta]) -> tuple[str, tuple[ToolCall, ...]]:
    content: list[str] = []
    heads: list[tuple[str, str]] = []
    arguments: list[list[str]] = []
    for delta in deltas:
        content.append(delta.content)
        for piece in delta.tool_calls:
            if piece.id is not None and piece.name is not None:
                heads.append((piece.id, piece.name))
                arguments.append([])
            arguments[piece.index].append(piece.arguments)
    calls = (
        ToolCall(id=call_id, name=name, arguments="".join(pieces))
        for (call_id, name), pieces in zip(heads, arguments, strict=True)
    )
    return "".join(content), tuple(calls)
