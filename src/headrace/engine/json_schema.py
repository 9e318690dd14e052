"""What is refused of a JSON schema before llguidance compiles it.

llguidance refuses the keywords of JSON Schema that it does not enforce (`not`, `if`, `contains`, ...) by itself. It
reads past keywords that no draft has, a misspelled one among them, takes instructions from "x-guidance", and its
compiler takes time and stack by the square or more of some numbers; these are refused here.
"""

import math
from collections.abc import Iterator, Mapping
from decimal import Decimal
from typing import Any

from headrace.config.refusals import clipped, shown
from headrace.errors import RequestError, nearest_name

MAX_SUBSCHEMAS = 2000
MAX_PROPERTIES = 1000
"""Of one object: compiling 1000 takes 0.3 s, and twice as many four times that."""
MAX_DEPTH = 60
MAX_REFERENCED_DEPTH = 600
"""Levels of the schema and of all that is referenced, one below the other: the compiler goes down them all at once, and
its stack of 8 MiB ends with the process at about 1500."""
MAX_MULTIPLE = 10_000
"""Least common multiple of all multipleOf, as whole numbers: states of a machine that counts remainders."""

_OF_NAMES = ("properties", "patternProperties", "$defs", "definitions")
_OF_LISTS = ("anyOf", "oneOf", "allOf", "prefixItems")
_SINGLE = ("items", "additionalItems", "additionalProperties")

_KNOWN = {
    *(*_OF_NAMES, *_OF_LISTS, *_SINGLE, "$ref", "type", "enum", "const", "required", "minProperties", "maxProperties"),
    *("minItems", "maxItems", "minLength", "maxLength", "pattern", "format", "multipleOf"),
    *("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"),
}
"""Enforced."""

_ANNOTATIONS = {
    *("$schema", "$id", "id", "$anchor", "$comment", "title", "description", "default", "example", "examples"),
    *("deprecated", "readOnly", "writeOnly", "contentEncoding", "contentMediaType", "discriminator", "externalDocs"),
}
"""These say nothing about what is valid."""


def check_json_schema(root: Mapping[str, Any], *, is_lenient: bool = False) -> None:
    """
    is_lenient: keywords that cannot be enforced are to be read past.

    Raises:
        RequestError: a keyword that is not enforced, or more of something than can be compiled in time.
    """
    num_parts, multiple, references = 0, 1, set()
    for schema, depth in _walk(root):
        num_parts += 1 + sum(_num_containers(schema[name]) for name in ("enum", "const") if name in schema)
        if num_parts > MAX_SUBSCHEMAS or depth > MAX_DEPTH:
            raise RequestError(
                f"the JSON schema is too large; allowed: {MAX_SUBSCHEMAS} subschemas, {MAX_DEPTH} levels deep"
            )
        if not is_lenient:
            _check_keywords(schema)
        _check_properties(schema)
        references.add(schema.get("$ref"))
        multiple = math.lcm(multiple, _multiple_of(schema))
        if multiple > MAX_MULTIPLE:
            raise RequestError(
                "multipleOf of the JSON schema is too large; allowed: numbers whose least common multiple, "
                f"without decimal point, is up to {MAX_MULTIPLE}"
            )
    num_levels = _height(root) + sum(_height(_target(root, name)) for name in references if name is not None)
    if num_levels > MAX_REFERENCED_DEPTH:
        raise RequestError(
            f"the JSON schema and what it references are {num_levels} levels deep, one below the other; allowed: up to "
            f"{MAX_REFERENCED_DEPTH}; reference less, or flatten what is referenced"
        )


def _walk(root: Any) -> Iterator[tuple[Mapping[str, Any], int]]:
    """Every subschema that is an object, with its depth."""
    pending = [(root, 1)]
    while pending:
        schema, depth = pending.pop()
        if isinstance(schema, Mapping):
            yield schema, depth
            pending += [(child, depth + 1) for child in _children(schema)]


def _children(schema: Mapping[str, Any]) -> Iterator[Any]:
    for name in _OF_NAMES:
        if isinstance(named := schema.get(name), Mapping):
            yield from named.values()
    for name in (*_OF_LISTS, "items"):
        if isinstance(listed := schema.get(name), list):
            yield from listed
    for name in _SINGLE:
        if isinstance(child := schema.get(name), Mapping):
            yield child


def _check_keywords(schema: Mapping[str, Any]) -> None:
    for name in schema.keys() - _KNOWN - _ANNOTATIONS:
        if name == "x-guidance" or not name.startswith("x-"):
            raise RequestError(
                f"the JSON schema has {shown(name)}, which cannot be enforced; leave it out; "
                f"{nearest_name(clipped(name), _KNOWN)}"
            )


def _check_properties(schema: Mapping[str, Any]) -> None:
    properties = schema.get("properties")
    if isinstance(properties, Mapping) and len(properties) > MAX_PROPERTIES:
        raise RequestError(
            f"an object of the JSON schema has {len(properties)} properties; allowed: up to {MAX_PROPERTIES}"
        )


def _multiple_of(schema: Mapping[str, Any]) -> int:
    """Without the point and zeros at the end; 1 where there is none, or none that llguidance would take."""
    given = schema.get("multipleOf", 1)
    if isinstance(given, bool) or not isinstance(given, int | float) or not given:
        return 1
    digits = Decimal(str(given)).as_tuple().digits
    return int("".join(map(str, digits)).rstrip("0") or 1)


def _num_containers(value: Any) -> int:
    """Lists and objects in a value, each of which is compiled like a schema; the list of an enum's values is none."""
    inside = value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ()
    return sum(isinstance(item, Mapping | list) + _num_containers(item) for item in inside)


def _height(schema: Any) -> int:
    return 1 + max(map(_height, _children(schema)), default=0) if isinstance(schema, Mapping) else 0


def _target(root: Any, reference: Any) -> Any:
    """What a reference names; the whole schema where that takes more than following a path, which is no less high."""
    target = root
    if not isinstance(reference, str) or not reference.startswith("#/"):
        return root
    for part in reference[2:].split("/"):
        name = part.replace("~1", "/").replace("~0", "~")
        if isinstance(target, list) and name.isdecimal() and len(name) < 5 and int(name) < len(target):
            target = target[int(name)]
        elif isinstance(target, Mapping) and name in target:
            target = target[name]
        else:
            return root
    return target
