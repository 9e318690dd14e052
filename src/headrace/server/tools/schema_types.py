"""Which JSON types a schema allows, for formats that write arguments as bare text."""

import json
from collections.abc import Mapping
from typing import Any

from headrace.server.tools.json_calls import loads

ALL_TYPES = frozenset({"string", "number", "integer", "boolean", "object", "array", "null"})
STRING = frozenset({"string"})
_PYTHON_WORDS = {"True": "true", "False": "false", "None": "null"}  # as chat templates render earlier calls


def argument_schema(parameters: Mapping[str, Any], key: str) -> Any:
    """The schema of one argument, as far as `properties` names it."""
    properties = parameters.get("properties")
    return properties.get(key) if isinstance(properties, Mapping) else None


def allowed_types(schema: Any, root: Mapping[str, Any]) -> frozenset[str]:
    """Types a value may have by type, enum, const, anyOf, oneOf and $ref into the root's; all, if it does not say."""
    found: set[str] = set()
    pending, seen = [schema], set()
    while pending:
        part = pending.pop()
        if not isinstance(part, Mapping):
            return ALL_TYPES
        reference = part.get("$ref")
        if isinstance(reference, str):
            if reference not in seen:  # each is followed once, however often schemas name one another
                seen.add(reference)
                pending.append(_referred(reference, root))
            continue
        branches = part.get("anyOf", part.get("oneOf"))
        types = _own_types(part)
        if types:
            found |= types
        elif isinstance(branches, list) and branches:
            pending += branches
        else:
            return ALL_TYPES
    return frozenset(found) or ALL_TYPES


def _own_types(schema: Mapping[str, Any]) -> frozenset[str]:
    types = schema.get("type")
    if types is not None:
        named = types if isinstance(types, list) else [types]
        return frozenset(name for name in named if isinstance(name, str)) & ALL_TYPES
    values = [schema["const"]] if "const" in schema else schema.get("enum")
    return frozenset(json_type(value) for value in values) if isinstance(values, list) else frozenset()


def json_type(value: Any) -> str:
    if value is None:
        return "null"
    for kind, name in ((bool, "boolean"), (int, "integer"), (float, "number"), (str, "string"), (list, "array")):
        if isinstance(value, kind):
            return name
    return "object"


def value_as_json(text: str, types: frozenset[str]) -> str:
    """The JSON of an argument written as bare text.

    A text that is JSON of an allowed type is taken at its word. Any other is a string, also where none is allowed: the
    client sees what the model wrote.
    """
    bare = _PYTHON_WORDS.get(text.strip(), text.strip())
    value = loads(bare)
    if value is not ... and not isinstance(value, str) and _allows(types, json_type(value)):
        return bare
    return json.dumps(text, ensure_ascii=False)


def _allows(types: frozenset[str], name: str) -> bool:
    return name in types or (name == "integer" and "number" in types) or (name == "number" and "integer" in types)


def _referred(reference: str, root: Mapping[str, Any]) -> Any:
    if not reference.startswith("#/"):
        return None
    target: Any = root
    for part in reference[2:].split("/"):
        target = target.get(part.replace("~1", "/").replace("~0", "~")) if isinstance(target, Mapping) else None
    return target
