"""What a parser of tool calls gives: pieces of content and pieces of calls, as OpenAI's streams carry them."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from uuid import uuid4


@dataclass(frozen=True, kw_only=True)
class ToolCallDelta:
    """A piece of one call. id and name come once, in the call's first piece; arguments are to be joined."""

    index: int
    id: str | None = None
    name: str | None = None
    arguments: str = ""

    def to_mapping(self) -> dict[str, Any]:
        """An entry of `choices[].delta.tool_calls`."""
        if self.id is None:
            return {"index": self.index, "function": {"arguments": self.arguments}}
        function = {"name": self.name, "arguments": self.arguments}
        return {"index": self.index, "id": self.id, "type": "function", "function": function}


@dataclass(frozen=True)
class ToolDelta:
    """What some more text has made certain: content and pieces of calls, in order; at most one piece of each call."""

    parts: tuple[str | ToolCallDelta, ...] = ()

    @property
    def content(self) -> str:
        return "".join([part for part in self.parts if isinstance(part, str)])

    @property
    def tool_calls(self) -> tuple[ToolCallDelta, ...]:
        return tuple([part for part in self.parts if isinstance(part, ToolCallDelta)])


@dataclass
class _Call:
    index: int
    id: str | None
    name: str | None
    arguments: list[str] = field(default_factory=list)

    def delta(self) -> ToolCallDelta:
        return ToolCallDelta(index=self.index, id=self.id, name=self.name, arguments="".join(self.arguments))


def new_call_id() -> str:
    return f"call_{uuid4().hex[:24]}"


class DeltaBuilder:
    """Gathers pieces until `take`.

    White space at the end of the content waits until more content follows: between text and a call it belongs to the
    call's syntax. `finish` gives it where there was no call.
    """

    def __init__(self, make_id: Callable[[], str]) -> None:
        self._make_id = make_id
        self._parts: list[list[str] | _Call] = []
        self._space = ""
        self.num_calls = 0

    def text(self, text: str) -> None:
        if body := text.rstrip():
            self._add_content(self._space + body)
            self._space = text[len(body) :]
        else:
            self._space += text

    def begin_call(self, name: str) -> None:
        self._parts.append(_Call(self.num_calls, self._make_id(), name))
        self.num_calls += 1

    def arguments(self, fragment: str) -> None:
        """More of the call that was begun last."""
        if not self._parts:
            self._parts.append(_Call(self.num_calls - 1, None, None))
        call = self._parts[-1]
        assert isinstance(call, _Call), "a call's arguments come without content between them"
        call.arguments.append(fragment)

    def finish(self) -> None:
        if self._space and not self.num_calls:
            self._add_content(self._space)
        self._space = ""

    def take(self) -> ToolDelta:
        delta = ToolDelta(tuple([part.delta() if isinstance(part, _Call) else "".join(part) for part in self._parts]))
        self._parts = []
        return delta

    def _add_content(self, text: str) -> None:
        if not self._parts or isinstance(self._parts[-1], _Call):
            self._parts.append([])
        content = self._parts[-1]
        assert isinstance(content, list)
        content.append(text)
