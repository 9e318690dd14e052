"""Items of a request as the messages that chat templates know."""

from collections.abc import Mapping, Sequence
from typing import Any

from headrace.server.errors import InvalidParameter
from headrace.server.tools.messages import parse_arguments

_ROLES = {"user": "user", "assistant": "assistant", "system": "system", "developer": "system"}
_TEXT_PARTS = ("input_text", "output_text", "text")
_FIELDS = {
    "message": {"type", "role", "content", "id", "status", "phase"},
    "function_call": {"type", "call_id", "name", "arguments", "id", "status"},
    "function_call_output": {"type", "call_id", "output", "id", "status"},
}


def make_messages(items: str | Sequence[Mapping[str, Any]], instructions: str | None) -> list[dict[str, Any]]:
    """Instructions come first, as the system's. A developer's messages are the system's, which templates know.

    Calls that follow a message of the assistant's, or one another, are one message with it, as models wrote them.

    Raises:
        InvalidParameter: names the item by its index.
    """
    messages: list[dict[str, Any]] = []
    if instructions is not None:
        messages.append({"role": "system", "content": instructions})
    if isinstance(items, str):
        return [*messages, {"role": "user", "content": items}]
    for index, item in enumerate(items):
        _add(messages, item, f"input[{index}]")
    return messages


def _add(messages: list[dict[str, Any]], item: Mapping[str, Any], where: str) -> None:
    kind = item.get("type", "message")
    if not isinstance(kind, str) or kind not in _FIELDS:
        raise InvalidParameter(f"{where}.type", f"{where}.type is {_shown(kind)}; allowed: {', '.join(_FIELDS)}")
    for name in item:
        if name not in _FIELDS[kind]:
            raise InvalidParameter(where, f"{where} of type '{kind}' has no field {_shown(name)}; leave it out")
    if kind == "message":
        messages.append(_message(item, where))
    elif kind == "function_call":
        _last_of_assistant(messages).setdefault("tool_calls", []).append(_call(item, where))
    else:
        content = _text(item.get("output"), f"{where}.output")
        messages.append({"role": "tool", "tool_call_id": _id(item, where), "content": content})


def _message(item: Mapping[str, Any], where: str) -> dict[str, Any]:
    role = item.get("role")
    if not isinstance(role, str) or role not in _ROLES:
        raise InvalidParameter(f"{where}.role", f"{where}.role is {_shown(role)}; allowed: {', '.join(_ROLES)}")
    return {"role": _ROLES[role], "content": _text(item.get("content"), f"{where}.content")}


def _last_of_assistant(messages: list[dict[str, Any]]) -> dict[str, Any]:
    if not messages or messages[-1]["role"] != "assistant":
        messages.append({"role": "assistant", "content": None})
    return messages[-1]


def _call(item: Mapping[str, Any], where: str) -> dict[str, Any]:
    name = item.get("name")
    if not isinstance(name, str) or not name:
        raise InvalidParameter(f"{where}.name", f"{where}.name must be the name of a function")
    arguments = parse_arguments(item.get("arguments"), f"{where}.arguments")
    return {"id": _id(item, where), "type": "function", "function": {"name": name, "arguments": arguments}}


def _id(item: Mapping[str, Any], where: str) -> str:
    call_id = item.get("call_id")
    if not isinstance(call_id, str):
        raise InvalidParameter(f"{where}.call_id", f"{where}.call_id must be the id of a call")
    return call_id


def _text(content: Any, where: str) -> str:
    """The text of some content; a list of parts is joined by newlines, as chat messages are."""
    if isinstance(content, str):
        return content
    if not isinstance(content, Sequence):
        raise InvalidParameter(where, f"{where} must be a string or a list of text parts")
    return "\n".join(_part(part, f"{where}[{index}]") for index, part in enumerate(content))


def _part(part: Any, where: str) -> str:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind not in _TEXT_PARTS:
        raise InvalidParameter(where, f"{where} has the type {_shown(kind)}; only text can be read: input_text")
    if not isinstance(part.get("text"), str):
        raise InvalidParameter(f"{where}.text", f"{where}.text must be a string")
    return str(part["text"])


def _shown(value: Any) -> str:
    return repr(value[:80]) if isinstance(value, str) else "absent" if value is None else type(value).__name__
