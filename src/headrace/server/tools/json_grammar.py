"""The grammar of calls that are JSON objects."""

from collections.abc import Mapping
from typing import Any

from headrace.server.tools.definitions import FunctionTool
from headrace.server.tools.lark import json_schema, literal

_ANY_OBJECT: Mapping[str, Any] = {"type": "object"}


def json_call(tool: FunctionTool, arguments_key: str, schema: Mapping[str, Any]) -> str:
    """A call's object as models were trained to write it: the name first.

    The arguments' schema stands alone, so that its references mean what they say.
    """
    head = f'{{"name": "{tool.name}", "{arguments_key}": '
    return f'{literal(head)} {json_schema(schema, is_exact=tool.strict)} "}}"'


def free_schema(tool: FunctionTool) -> Mapping[str, Any]:
    """What a call that nobody forced is held to."""
    return tool.schema if tool.strict else _ANY_OBJECT
