"""An answer's items while it is written, and the events that tell a client of them."""

from collections.abc import Iterable, Iterator
from typing import Any
from uuid import uuid4

from headrace.server.tools.deltas import ToolCallDelta, ToolDelta

Event = dict[str, Any]

COMPLETED, INCOMPLETE, IN_PROGRESS = "completed", "incomplete", "in_progress"


class OutputItems:
    """Owns the items. At most the last one is open; every change gives its events, without their numbers.

    Log probabilities are those of one message: of whatever else an answer may have, nobody can ask for them.
    """

    def __init__(self) -> None:
        self.items: list[dict[str, Any]] = []
        self._is_open = False
        self._new_logprobs: list[dict[str, Any]] = []
        """Of tokens whose text was not shown yet."""

    def add(self, delta: ToolDelta, logprobs: Iterable[dict[str, Any]] = ()) -> Iterator[Event]:
        self._new_logprobs += logprobs
        for part in delta.parts:
            yield from self._add_text(part) if isinstance(part, str) else self._add_call(part)

    def finish(self, status: str) -> Iterator[Event]:
        """Close the last item with a status; an answer without a word is an empty message."""
        if not self.items:
            yield from self._open_message()
        yield from self._close(status)

    def _add_text(self, text: str) -> Iterator[Event]:
        if not self._is_open or self._last["type"] != "message":
            text = text.lstrip() if self.items else text  # what stood between a call and this is no text
            yield from self._close(COMPLETED)
            yield from self._open_message()
        self._part["text"] += text
        yield self._of_part("response.output_text.delta", delta=text, logprobs=self._take_logprobs())

    def _add_call(self, piece: ToolCallDelta) -> Iterator[Event]:
        if piece.id is not None:
            yield from self._close(COMPLETED)
            call = {"call_id": piece.id, "name": piece.name, "arguments": ""}
            yield from self._open({"id": f"fc_{uuid4().hex}", "type": "function_call", "status": IN_PROGRESS, **call})
        if piece.arguments:
            self._last["arguments"] += piece.arguments
            yield self._of_item("response.function_call_arguments.delta", delta=piece.arguments)

    def _open_message(self) -> Iterator[Event]:
        message = {"id": f"msg_{uuid4().hex}", "type": "message", "status": IN_PROGRESS, "role": "assistant"}
        yield from self._open({**message, "content": []})
        part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        self._last["content"].append(part)
        yield self._of_part("response.content_part.added", part={**part, "logprobs": []})

    def _take_logprobs(self) -> list[dict[str, Any]]:
        """Those that are new, which the message has from now on."""
        taken, self._new_logprobs = self._new_logprobs, []
        self._part["logprobs"] += taken
        return taken

    def _open(self, item: dict[str, Any]) -> Iterator[Event]:
        self.items.append(item)
        self._is_open = True
        yield self._of_output("response.output_item.added")

    def _close(self, status: str) -> Iterator[Event]:
        if not self._is_open:
            return
        if self._last["type"] == "message":
            self._take_logprobs()
            text, logprobs = self._part["text"], self._part["logprobs"]
            yield self._of_part("response.output_text.done", text=text, logprobs=logprobs)
            yield self._of_part("response.content_part.done", part=dict(self._part))
        else:
            done = {"name": self._last["name"], "arguments": self._last["arguments"]}
            yield self._of_item("response.function_call_arguments.done", **done)
        self._last["status"] = status
        self._is_open = False
        yield self._of_output("response.output_item.done")

    @property
    def _last(self) -> dict[str, Any]:
        return self.items[-1]

    @property
    def _part(self) -> dict[str, Any]:
        part: dict[str, Any] = self._last["content"][0]
        return part

    def _of_output(self, kind: str) -> Event:
        """An event that shows the whole item, as it is now."""
        item = self._last
        if item["type"] == "message":
            item = {**item, "content": [dict(part) for part in item["content"]]}
        return {"type": kind, "output_index": len(self.items) - 1, "item": dict(item)}

    def _of_item(self, kind: str, **fields: Any) -> Event:
        return {"type": kind, "item_id": self._last["id"], "output_index": len(self.items) - 1, **fields}

    def _of_part(self, kind: str, **fields: Any) -> Event:
        return self._of_item(kind, content_index=0, **fields)


def exhaust(events: Iterable[Event]) -> None:
    """Make the changes without telling of them."""
    for _ in events:
        pass
