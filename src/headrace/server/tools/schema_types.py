"""Which JSON types a schema allows, for formats that write arguments as bare text."""

import json
from collections.abc import Mapping
from typing import Any

from headrace.server.tools.json_calls import loads

ALL_TYPES = frozenset({"string", "number", "integer", "boolean", "object", "array", "null"})
STRING = frozenset({"string"})
_PYTHON_WORDS = {"True": "true", "False": "false", "None": "null"}  # as chat templates render earlier calls
_MAX_REFERENCES = 16


def argument_schema(parameters: Mapping[str, Any], key: str) -> Any:
    """The schema of one argument, as far as `properties` names it."""
    properties = parameters.get("properties")
    return properties.get(key) if isinstance(properties, Mapping) else None


def allowed_types(schema: Any, root: Mapping[str, Any], num_references: int = 0) -> frozenset[str]:
    """Types a value may have by type, enum, const, anyOf, oneOf and $ref into the root's; all, if it does not say."""
    if not isinstance(schema, Mapping) or num_references > _MAX_REFERENCES:
        return ALL_TYPES
    if "$ref" in schema:
        return allowed_types(_referred(schema["$ref"], root), root, num_references + 1)
    types = schema.get("type")
    if isinstance(types, str):
        return frozenset({types}) & ALL_TYPES or ALL_TYPES
    if isinstance(types, list):
        return frozenset(name for name in types if isinstance(name, str)) & ALL_TYPES or ALL_TYPES
    if "const" in schema or isinstance(schema.get("enum"), list):
        values = [schema["const"]] if "const" in schema else schema["enum"]
        return frozenset(json_type(value) for value in values)
    for name in ("anyOf", "oneOf"):
        if isinstance(schema.get(name), list):
            return frozenset[str]().union(*(allowed_types(s, root, num_references + 1) for s in schema[name]))
    return ALL_TYPES


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


def _referred(reference: Any, root: Mapping[str, Any]) -> Any:
    if not isinstance(reference, str) or not reference.startswith("#/"):
        return None
    target: Any = root
    for part in reference[2:].split("/"):
        target = target.get(part.replace("~1", "/").replace("~0", "~")) if isinstance(target, Mapping) else None
    return target
