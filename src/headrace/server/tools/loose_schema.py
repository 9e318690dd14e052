"""A schema without what cannot be enforced, for functions that do not ask for it (`strict`).

Schemas of tools come from many programs, with keywords that say nothing of validity or that llguidance does not
enforce. A call that is forced must not fail for those; a strict function keeps them, and is refused if need be.
"""

from collections.abc import Mapping
from typing import Any

_BY_NAME = ("properties", "patternProperties", "$defs", "definitions")
_LISTS = ("anyOf", "allOf", "prefixItems")
_SINGLE = ("items", "additionalProperties")
_PLAIN = frozenset(
    {"$ref", "type", "enum", "const", "required", "minProperties", "maxProperties", "minItems", "maxItems"}
    | {"minLength", "maxLength", "pattern", "multipleOf", "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"}
)
_FORMATS = frozenset(
    {"date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri"}  # llguidance's
)
_MAX_LEVELS = 48


def loosened(schema: Any, num_levels: int = 0) -> Any:
    """A copy that allows all that the schema allows. oneOf becomes anyOf: no grammar can count which of them hold.

    Below 48 levels anything is allowed.
    """
    if not isinstance(schema, Mapping):
        return schema
    if num_levels >= _MAX_LEVELS:
        return {}
    level = num_levels + 1
    kept: dict[str, Any] = {}
    for key, value in schema.items():
        if key in _BY_NAME and isinstance(value, Mapping):
            kept[key] = {name: loosened(part, level) for name, part in value.items()}
        elif key in _LISTS and isinstance(value, list):
            kept[key] = [loosened(part, level) for part in value]
        elif key == "oneOf" and isinstance(value, list) and "anyOf" not in schema:
            kept["anyOf"] = [loosened(part, level) for part in value]
        elif key in _SINGLE and isinstance(value, Mapping | bool):
            kept[key] = loosened(value, level)
        elif key in _PLAIN or (key == "format" and value in _FORMATS):
            kept[key] = value
    return kept
