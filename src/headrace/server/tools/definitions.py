"""The functions that a request offers: OpenAI's `tools`, checked."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from headrace.errors import nearest_name
from headrace.server.errors import InvalidParameter

MAX_TOOLS = 128
MAX_DESCRIPTION_CHARACTERS = 64 * 1024

_NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}", re.ASCII)
_FUNCTION_FIELDS = ("name", "description", "parameters", "strict")
_NO_PARAMETERS: Mapping[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}


@dataclass(frozen=True, kw_only=True)
class FunctionTool:
    """parameters: the JSON schema of its arguments; None for a function without any.

    strict: whenever it is called, the arguments follow that schema.
    """

    name: str
    description: str | None = None
    parameters: Mapping[str, Any] | None = None
    strict: bool = False

    @property
    def schema(self) -> Mapping[str, Any]:
        """What its arguments must be: always an object."""
        return _NO_PARAMETERS if self.parameters is None else {"type": "object", **self.parameters}

    def to_mapping(self) -> dict[str, Any]:
        """As chat templates want it, in the order of keys that models were trained on."""
        function: dict[str, Any] = {"name": self.name}
        if self.description is not None:
            function["description"] = self.description
        if self.parameters is not None:
            function["parameters"] = self.parameters
        return {"type": "function", "function": function}


def parse_tools(given: Any, *, is_flat: bool = False) -> tuple[FunctionTool, ...]:
    """
    is_flat: a function's fields lie beside its type, as in the Responses API, not in `function`.

    Raises:
        InvalidParameter: names the tool by its index, and what is wrong with it.
    """
    if given is None:
        return ()
    if not isinstance(given, Sequence) or isinstance(given, str | bytes):
        raise InvalidParameter("tools", "tools must be a list of functions")
    if len(given) > MAX_TOOLS:
        raise InvalidParameter("tools", f"tools has {len(given)} entries; at most {MAX_TOOLS} are allowed")
    tools = tuple(_parse_tool(tool, f"tools[{index}]", is_flat) for index, tool in enumerate(given))
    seen: dict[str, int] = {}
    for index, tool in enumerate(tools):
        if (first := seen.setdefault(tool.name, index)) != index:
            raise InvalidParameter(
                f"tools[{index}]", f"tools[{index}] has the name '{tool.name}' of tools[{first}]; each needs its own"
            )
    return tools


def _parse_tool(tool: Any, where: str, is_flat: bool) -> FunctionTool:
    if not isinstance(tool, Mapping):
        raise InvalidParameter(where, f"{where} must be an object with a type and a function")
    if tool.get("type") != "function":
        raise InvalidParameter(
            f"{where}.type", f"{where}.type is {_shown(tool.get('type'))}; only 'function' is supported"
        )
    if is_flat:
        return _parse_function({key: value for key, value in tool.items() if key != "type"}, where)
    _check_fields(tool, ("type", "function"), where)
    return _parse_function(tool.get("function"), f"{where}.function")


def _parse_function(function: Any, where: str) -> FunctionTool:
    if not isinstance(function, Mapping):
        raise InvalidParameter(where, f"{where} must be an object with a name")
    _check_fields(function, _FUNCTION_FIELDS, where)
    name, strict = function.get("name"), function.get("strict")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise InvalidParameter(
            f"{where}.name", f"{where}.name is {_shown(name)}; it must be 1 to 64 letters, digits, '_' and '-'"
        )
    if strict is not None and not isinstance(strict, bool):
        raise InvalidParameter(f"{where}.strict", f"{where}.strict must be true or false")
    return FunctionTool(
        name=name,
        description=_parse_description(function.get("description"), where),
        parameters=_parse_parameters(function.get("parameters"), where),
        strict=bool(strict),
    )


def _parse_description(description: Any, where: str) -> str | None:
    if description is None or (isinstance(description, str) and len(description) <= MAX_DESCRIPTION_CHARACTERS):
        return description
    raise InvalidParameter(
        f"{where}.description",
        f"{where}.description must be a string of at most {MAX_DESCRIPTION_CHARACTERS} characters",
    )


def _parse_parameters(parameters: Any, where: str) -> Mapping[str, Any] | None:
    if parameters is None:
        return None
    where = f"{where}.parameters"
    if not isinstance(parameters, Mapping):
        raise InvalidParameter(where, f"{where} must be a JSON schema: an object")
    if parameters.get("type", "object") != "object":
        raise InvalidParameter(
            f"{where}.type", f"{where}.type is {_shown(parameters['type'])}; arguments are always of type 'object'"
        )
    if not isinstance(parameters.get("properties", {}), Mapping):
        raise InvalidParameter(f"{where}.properties", f"{where}.properties must be an object of schemas")
    required = parameters.get("required", [])
    if not isinstance(required, list | tuple) or not all(isinstance(name, str) for name in required):
        raise InvalidParameter(f"{where}.required", f"{where}.required must be a list of names")
    return parameters


def _check_fields(given: Mapping[str, Any], allowed: Sequence[str], where: str) -> None:
    for name in given:
        if name not in allowed:
            raise InvalidParameter(
                where, f"{where} has no field {_shown(name)}; {nearest_name(str(name)[:80], allowed)}"
            )


def _shown(value: Any) -> str:
    text = repr(value) if isinstance(value, str) else "absent" if value is None else type(value).__name__
    return text if len(text) <= 80 else text[:77] + "..."
