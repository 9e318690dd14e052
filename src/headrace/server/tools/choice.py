"""Whether and what a model may call: OpenAI's `tool_choice` and `parallel_tool_calls`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from headrace.errors import nearest_name
from headrace.server.errors import InvalidParameter
from headrace.server.tools.definitions import FunctionTool

_PARAM = "tool_choice"
_MODES = ("none", "auto", "required")
_ALLOWED = "allowed: 'none', 'auto', 'required', one function, or allowed_tools"


@dataclass(frozen=True, kw_only=True)
class ToolChoice:
    """
    tools: those that may be called; empty for none. is_forced: there must be a call. is_single: at most one.
    """

    tools: tuple[FunctionTool, ...] = ()
    is_forced: bool = False
    is_single: bool = False


def parse_tool_choice(
    given: Any, tools: Sequence[FunctionTool], parallel_tool_calls: bool | None = None, *, is_flat: bool = False
) -> ToolChoice:
    """
    is_flat: names and modes lie beside the type, as in the Responses API.

    Raises:
        InvalidParameter: an unknown choice, or one that the tools cannot serve.
    """
    is_single = parallel_tool_calls is False
    if given is None or isinstance(given, str):
        return _parse_mode(given or "auto", tuple(tools), is_single, "tool_choice")
    kind = given.get("type") if isinstance(given, Mapping) else None
    if kind == "function":
        function = _part(given, "function", is_flat, "tool_choice")
        tool = _find(function.get("name"), tools, "tool_choice" if is_flat else "tool_choice.function")
        return ToolChoice(tools=(tool,), is_forced=True, is_single=True)
    if kind == "allowed_tools":
        allowed = _part(given, "allowed_tools", is_flat, "tool_choice")
        where = "tool_choice" if is_flat else "tool_choice.allowed_tools"
        if allowed.get("mode") not in ("auto", "required"):
            raise InvalidParameter(_PARAM, f"{where}.mode must be 'auto' or 'required'")
        return _parse_mode(
            allowed["mode"], _parse_allowed(allowed.get("tools"), tools, is_flat, where), is_single, where
        )
    raise InvalidParameter(
        _PARAM, f"tool_choice has the type {kind!r}; {_ALLOWED}" if kind else f"tool_choice: {_ALLOWED}"
    )


def _parse_mode(mode: str, tools: tuple[FunctionTool, ...], is_single: bool, where: str) -> ToolChoice:
    if mode not in _MODES:
        raise InvalidParameter(_PARAM, f"{where} is {mode[:80]!r}; {_ALLOWED}")
    if mode == "required" and not tools:
        raise InvalidParameter(_PARAM, f"{where} is 'required', but there is no tool to call; give tools")
    if mode == "none":
        return ToolChoice()
    return ToolChoice(tools=tools, is_forced=mode == "required", is_single=is_single)


def _parse_allowed(given: Any, tools: Sequence[FunctionTool], is_flat: bool, where: str) -> tuple[FunctionTool, ...]:
    if not isinstance(given, Sequence) or isinstance(given, str) or not given:
        raise InvalidParameter(_PARAM, f"{where}.tools must be a list of at least one function")
    names = set()
    for index, entry in enumerate(given):
        here = f"{where}.tools[{index}]"
        if not isinstance(entry, Mapping) or entry.get("type") != "function":
            raise InvalidParameter(_PARAM, f"{here} must be an object of type 'function'")
        names.add(_find(_part(entry, "function", is_flat, here).get("name"), tools, here).name)
    return tuple(tool for tool in tools if tool.name in names)


def _part(given: Mapping[str, Any], name: str, is_flat: bool, where: str) -> Mapping[str, Any]:
    """What OpenAI's chat API nests below the type's own name."""
    part = given if is_flat else given.get(name)
    if not isinstance(part, Mapping):
        raise InvalidParameter(_PARAM, f"{where}.{name} must be an object")
    return part


def _find(name: Any, tools: Sequence[FunctionTool], where: str) -> FunctionTool:
    for tool in tools:
        if tool.name == name:
            return tool
    if not isinstance(name, str):
        raise InvalidParameter(_PARAM, f"{where}.name must be the name of one of tools")
    if not tools:
        raise InvalidParameter(_PARAM, f"{where}.name is {name[:80]!r}, but there are no tools; give tools")
    raise InvalidParameter(
        _PARAM, f"{where}.name is not one of tools; {nearest_name(name[:80], [tool.name for tool in tools])}"
    )
