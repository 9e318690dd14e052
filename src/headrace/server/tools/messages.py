"""Earlier calls and their results, as chat templates want them: arguments as objects, not as the JSON clients send."""

from collections.abc import Mapping, Sequence
from typing import Any

from headrace.server.errors import InvalidParameter
from headrace.server.tools.json_calls import loads


def prepare_messages(messages: Sequence[Any]) -> list[Any]:
    """Copies of the messages whose tool calls have arguments as mappings. Everything else is left to the template.

    Raises:
        InvalidParameter: names the call by its indexes; or a message of the old `functions` API.
    """
    return [_prepare(message, f"messages[{index}]") for index, message in enumerate(messages)]


def _prepare(message: Any, where: str) -> Any:
    if not isinstance(message, Mapping):
        return message
    if message.get("role") == "function" or message.get("function_call") is not None:
        raise InvalidParameter(
            where, f"{where} is of the old functions API; send tool_calls, and results with the role 'tool'"
        )
    if message.get("role") == "tool" and not isinstance(message.get("tool_call_id"), str):
        raise InvalidParameter(
            f"{where}.tool_call_id", f"{where}.tool_call_id must be the id of the call that this is the result of"
        )
    prepared = {key: value for key, value in message.items() if key not in ("tool_calls", "function_call")}
    calls = message.get("tool_calls")
    if not calls:
        return prepared
    if not isinstance(calls, Sequence) or isinstance(calls, str):
        raise InvalidParameter(f"{where}.tool_calls", f"{where}.tool_calls must be a list of calls")
    prepared["tool_calls"] = [_prepare_call(call, f"{where}.tool_calls[{i}]") for i, call in enumerate(calls)]
    return prepared


def _prepare_call(call: Any, where: str) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping):
        raise InvalidParameter(where, f"{where} must be an object with id, type and function")
    if call.get("type", "function") != "function":
        raise InvalidParameter(
            f"{where}.type", f"{where}.type is {str(call['type'])[:80]!r}; only 'function' is supported"
        )
    if not isinstance(function.get("name"), str) or not function["name"]:
        raise InvalidParameter(f"{where}.function.name", f"{where}.function.name must be a string")
    arguments = parse_arguments(function.get("arguments"), f"{where}.function.arguments")
    return {**call, "function": {**function, "arguments": arguments}}


def parse_arguments(given: Any, where: str) -> Mapping[str, Any]:
    """An empty text stands for no arguments, as clients send it for functions without parameters."""
    if given is None or given == "":
        return {}
    value = loads(given) if isinstance(given, str) else given
    if not isinstance(value, Mapping):
        raise InvalidParameter(where, f'{where} must be the JSON of an object, such as \'{{"city": "Rome"}}\'')
    return value
