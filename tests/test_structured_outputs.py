"""What form an output may be asked to have: what is refused, and that it survives every way it travels."""

import copy
import json
import math
import pickle
from functools import reduce
from types import MappingProxyType

import pytest

from headrace import SamplingParams, StructuredOutputs
from headrace.config.structured_outputs import MAX_CHOICES, MAX_GRAMMAR_BYTES, MAX_REGEX_BYTES
from headrace.errors import RequestError

SCHEMA = {"type": "object", "properties": {"b": {"const": "é\0"}, "a": {"enum": [1, 2.5, None]}}, "required": ["b"]}
GOOD = [
    {"json": SCHEMA},
    {"json": json.dumps(SCHEMA)},
    {"json": {}},
    {"regex": r"[ab]{3}\d"},
    {"choice": ["yes", "no", " "]},
    {"grammar": 'start: "a" start | "b"'},
    {"json_object": True},
]
DEEP = reduce(lambda inner, _: {"items": inner}, range(100_000), {})
BAD = [
    *({"json": value} for value in ["", "[]", "1", "null", "{", '{"a": NaN}', 5, [], True, b"{}", {1: 2}, {"a": {2}}]),
    *(
        {"json": value}
        for value in [{"const": math.nan}, {"const": "\ud800"}, '{"const": "\\ud800"}', DEEP, {"a": b"x"}]
    ),
    *({"json": value} for value in [{"a": "x" * MAX_GRAMMAR_BYTES}, "[" * 100_000, '{"a": 1' + "0" * 5000 + "}"]),
    *({"regex": value} for value in ["", 5, b"a", "\ud800", "a" * (MAX_REGEX_BYTES + 1), ["a"]]),
    *({"choice": value} for value in ["yes", [], [""], [1], ["a", None], {"a": 1}, b"ab", ["\udfff"], 5]),
    *(
        {"choice": value}
        for value in [["a"] * (MAX_CHOICES + 1), ["é" * MAX_REGEX_BYTES], ["a" * MAX_REGEX_BYTES] * 17]
    ),
    *({"grammar": value} for value in ["", 5, "\ud800", "a" * (MAX_GRAMMAR_BYTES + 1)]),
    *({"json_object": value} for value in [False, None, 1, "true"]),
    {},
    {"json": None, "regex": None},
    {"json": {}, "regex": "a"},
    {"json_object": True, "choice": ["a"]},
]


@pytest.mark.parametrize("fields", BAD, ids=lambda fields: "+".join(fields) or "nothing")
def test_refuses(fields: dict[str, object]) -> None:
    for make in (
        lambda: StructuredOutputs(**fields),
        lambda: StructuredOutputs.from_mapping(fields),
        lambda: SamplingParams(structured_outputs=fields),
    ):
        with pytest.raises(RequestError, match="structured_outputs") as refusal:
            make()
        assert len(str(refusal.value)) < 400
        assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("value", [5, "json", ["json"], True, {"jsno": {}}, {1: 2}])
def test_refuses_what_is_no_structured_outputs(value: object) -> None:
    with pytest.raises(RequestError, match="structured_outputs"):
        SamplingParams(structured_outputs=value)


def test_an_unknown_name_is_answered_with_the_nearest() -> None:
    with pytest.raises(RequestError, match=r"no 'jsno'.*json"):
        SamplingParams(structured_outputs={"jsno": {}})


@pytest.mark.parametrize("fields", GOOD, ids="+".join)
def test_survives_every_way_it_travels(fields: dict[str, object]) -> None:
    params = SamplingParams(structured_outputs=fields, temperature=0)
    outputs = params.structured_outputs
    assert outputs == StructuredOutputs(**fields)
    assert params == SamplingParams(structured_outputs=outputs, temperature=0)
    assert params != SamplingParams(temperature=0)
    assert StructuredOutputs.from_mapping(json.loads(json.dumps(outputs.to_mapping()))) == outputs
    assert SamplingParams.from_mapping(json.loads(json.dumps(params.to_mapping()))) == params
    assert pickle.loads(pickle.dumps(params)) == params
    assert copy.deepcopy(params) == params
    hash(outputs)


def test_a_schema_keeps_the_order_of_its_properties() -> None:
    """It is the order in which a model writes them."""
    outputs = StructuredOutputs(json=MappingProxyType(SCHEMA))
    assert list(json.loads(outputs.json)["properties"]) == ["b", "a"]
    assert json.loads(outputs.json) == SCHEMA
    assert outputs == StructuredOutputs(json=json.dumps(SCHEMA, indent=2))
    assert outputs != StructuredOutputs(json=SCHEMA | {"required": ["a"]})
