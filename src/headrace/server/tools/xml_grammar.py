"""The grammar of Qwen3-Coder's calls: each argument as bare text between tags, in the order of the schema."""

import json
from collections.abc import Mapping
from typing import Any

from headrace.server.errors import InvalidParameter
from headrace.server.tools.definitions import FunctionTool
from headrace.server.tools.lark import json_schema, literal
from headrace.server.tools.schema_types import STRING, allowed_types

_END = r"<\/parameter>"
_ANY_VALUE = rf'(/(?s:.*)/ & ~/(?s:.*){_END}(?s:.*)/) "\n</parameter>\n"'
_CLOSE = "\n</parameter>\n"
_NOTES = frozenset({"type", "title", "description", "default", "examples", "deprecated", "$comment"})
_ROOT_KEYS = _NOTES | {"properties", "required", "additionalProperties", "$defs", "definitions", "$schema", "$id"}


def xml_call(number: int, tool: FunctionTool) -> str:
    """The rules of one function.

    Raises:
        InvalidParameter: its schema says more than this format can hold a model to.
    """
    properties: dict[str, Any] = dict(tool.schema.get("properties", {}))
    required = list(tool.schema.get("required", []))
    if beyond := sorted(tool.schema.keys() - _ROOT_KEYS):
        if tool.strict or not properties:
            raise _refusal(tool, f"its parameters have '{beyond[0]}'")
    elif not properties and not required and tool.schema.get("additionalProperties") is not False:
        return any_call(number, tool)
    properties |= {name: {} for name in required if name not in properties}
    parts, rules = [], []
    for index, (name, schema) in enumerate(properties.items()):
        if schema is False:
            continue
        rule = f"value_{number}_{index}"
        parts.append(f"({literal(_head(tool, name))} {rule}){'' if name in required else '?'}")
        rules.append(_value_rule(rule, schema, tool, name))
    return "\n".join([_call_rule(number, tool, " ".join(parts)), *rules])


def any_call(number: int, tool: FunctionTool) -> str:
    """Rules for whatever parameters."""
    value = f"VALUE_{number}"
    pairs = rf'("<parameter=" /[^<>\n]+/ ">\n" {value})*'
    return "\n".join([_call_rule(number, tool, pairs), f"{value}: {_ANY_VALUE}"])


def _call_rule(number: int, tool: FunctionTool, parameters: str) -> str:
    return f'call_{number}: {literal(f"<function={tool.name}>" + chr(10))} {parameters} "</function>"'


def _head(tool: FunctionTool, name: str) -> str:
    if not name or any(character in name for character in "<>\n"):
        raise _refusal(tool, f"the name of its parameter {name[:80]!r} cannot be written in a tag")
    return f"<parameter={name}>\n"


def _value_rule(rule: str, schema: Any, tool: FunctionTool, name: str) -> str:
    """One value with its closing tag. Any text is a string, so that only other types and lists of values bind it."""
    root = tool.schema
    types = allowed_types(schema, root)
    if values := _listed_values(schema):
        texts = [value if isinstance(value, str) else json.dumps(value, ensure_ascii=False) for value in values]
        if any("</parameter>" in text for text in texts):
            raise _refusal(tool, f"a value of its parameter '{name}' has a closing tag in it")
        return f"{rule}: ({' | '.join(map(literal, texts))}) {literal(_CLOSE)}"
    if not types & STRING:
        definitions = {key: root[key] for key in ("$defs", "definitions") if key in root}
        return f"{rule}: {json_schema({**definitions, **schema}, is_exact=tool.strict)} {literal(_CLOSE)}"
    if tool.strict and isinstance(schema, Mapping) and (beyond := sorted(schema.keys() - _NOTES)):
        raise _refusal(tool, f"its parameter '{name}' may be a string and has '{beyond[0]}'")
    return f"{rule}: {rule.upper()}\n{rule.upper()}: {_ANY_VALUE}"


def _listed_values(schema: Any) -> list[Any]:
    if not isinstance(schema, Mapping):
        return []
    values = [schema["const"]] if "const" in schema else schema.get("enum")
    return values if isinstance(values, list) else []


def _refusal(tool: FunctionTool, what: str) -> InvalidParameter:
    return InvalidParameter(
        "tools",
        f"the function '{tool.name}' cannot be enforced in this model's tool format: {what}; "
        "leave it out, or set strict to false and tool_choice to 'auto'",
    )
