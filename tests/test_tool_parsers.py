"""Tool calls read out of text: examples written by hand, and texts written by another program in pieces of any size."""

import json
from collections.abc import Callable
from itertools import count, pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.server.tools.hermes import HermesParser
from headrace.server.tools.llama3 import Llama3Parser
from headrace.server.tools.parser import ToolCallParser
from headrace.server.tools.qwen import QwenParser
from headrace.server.tools.whole import join_deltas, parse_whole

SCHEMA = {
    "type": "object",
    "properties": {
        "text": {"type": "string"},
        "count": {"type": "integer"},
        "ratio": {"anyOf": [{"type": "number"}, {"type": "null"}]},
        "flag": {"type": "boolean"},
        "items": {"$ref": "#/$defs/items"},
        "maybe": {"type": ["string", "null"]},
        "unit": {"enum": ["C", "F"]},
        "any": {},
    },
    "$defs": {"items": {"type": "array"}},
}


def numbered() -> Callable[[], str]:
    numbers = count()
    return lambda: f"call_{next(numbers)}"


def hermes() -> ToolCallParser:
    return HermesParser(numbered())


def llama3() -> ToolCallParser:
    return Llama3Parser(numbered())


def qwen() -> ToolCallParser:
    return QwenParser({"f": SCHEMA}, numbered())


def read(parser: ToolCallParser, text: str) -> tuple[str, list[tuple[str, str]]]:
    content, calls = parse_whole(parser, text)
    assert [call.id for call in calls] == [f"call_{i}" for i in range(len(calls))]
    return content, [(call.name, call.arguments) for call in calls]


CALL = '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>'

HERMES = {
    "no call": ("Hello, world!\n", ("Hello, world!\n", [])),
    "one call": (CALL, ("", [("f", '{"a": 1}')])),
    "text before": ("Let me look.\n" + CALL, ("Let me look.", [("f", '{"a": 1}')])),
    "text around": (f"A\n{CALL}\nB ", ("A\n\nB", [("f", '{"a": 1}')])),
    "two calls": (f"{CALL}\n{CALL}\n", ("", [("f", '{"a": 1}')] * 2)),
    "compact": ('<tool_call>{"name":"f","arguments":{}}</tool_call>', ("", [("f", "{}")])),
    "arguments first": (
        '<tool_call>{"arguments": {"a": [1, "}"]}, "name": "f"}</tool_call>',
        ("", [("f", '{"a": [1, "}"]}')]),
    ),
    "arguments as a string": (
        '<tool_call>{"name": "f", "arguments": "{\\"a\\": \\"é\\"}"}</tool_call>',
        ("", [("f", '{"a": "é"}')]),
    ),
    "no arguments": ('<tool_call>{"name": "f"}</tool_call>', ("", [("f", "{}")])),
    "null arguments": ('<tool_call>{"name": "f", "arguments": null}</tool_call>', ("", [("f", "{}")])),
    "further keys": (
        '<tool_call>{"id": "x", "name": "f", "arguments": {}, "k": [{"}": 1}], "l": 2}</tool_call>!',
        ("!", [("f", "{}")]),
    ),
    "escapes in the name": ('<tool_call>{"name": "\\u0066\\"", "arguments": {}}</tool_call>', ("", [('f"', "{}")])),
    "tags in a string": (
        '<tool_call>{"name": "f", "arguments": {"a": "</tool_call><tool_call>{\\"\\\\"}}</tool_call>',
        ("", [("f", '{"a": "</tool_call><tool_call>{\\"\\\\"}')]),
    ),
    "line break in a string": (
        '<tool_call>{"name": "f", "arguments": {"a": "x\ny\t"}}</tool_call>',
        ("", [("f", '{"a": "x\\ny\\t"}')]),
    ),
    "one brace too many": ('<tool_call>{"name": "f", "arguments": {}}}\n</tool_call>', ("", [("f", "{}")])),
    "one brace too few": ('<tool_call>{"name": "f", "arguments": {}\n</tool_call> B', (" B", [("f", "{}")])),
    "no closing tag": ('<tool_call>{"name": "f", "arguments": {}}', ("", [("f", "{}")])),
    "no closing tag between": (
        '<tool_call>{"name": "f", "arguments": {}}\n' + CALL,
        ("", [("f", "{}"), ("f", '{"a": 1}')]),
    ),
    "cut in the arguments": ('A<tool_call>{"name": "f", "arguments": {"a": "b', ("A", [("f", '{"a": "b')])),
    "cut after the arguments": ('<tool_call>{"name": "f", "arguments": {"a": 1}', ("", [("f", '{"a": 1}')])),
    "broken arguments": ('<tool_call>{"name": "f", "arguments": {oops}}</tool_call>', ("", [("f", "{oops}")])),
    "broken after the arguments": (
        '<tool_call>{"name": "f", "arguments": {}, oops}</tool_call>',
        (", oops}", [("f", "{}")]),
    ),
    "cut in the name": ('A <tool_call>{"name": "f', ('A <tool_call>{"name": "f', [])),
    "cut in the tag": ("A <tool_ca", ("A <tool_ca", [])),
    "tag in prose": ("Use <tool_call> tags.", ("Use <tool_call> tags.", [])),
    "not JSON": ("<tool_call>f(1)</tool_call>", ("<tool_call>f(1)</tool_call>", [])),
    "an unknown key": ('<tool_call>{"function": "f"}</tool_call>', ('<tool_call>{"function": "f"}</tool_call>', [])),
    "a name that is no string": ('<tool_call>{"name": 1}</tool_call>', ('<tool_call>{"name": 1}</tool_call>', [])),
    "an empty name": ('<tool_call>{"name": ""}</tool_call>', ('<tool_call>{"name": ""}</tool_call>', [])),
    "arguments that are a list": (
        '<tool_call>{"name": "f", "arguments": [1]}</tool_call>',
        ('<tool_call>{"name": "f", "arguments": [1]}</tool_call>', []),
    ),
    "no name": ('<tool_call>{"arguments": {}}</tool_call>', ('<tool_call>{"arguments": {}}</tool_call>', [])),
    "broken arguments first": (
        '<tool_call>{"arguments": {oops}, "name": "f"}</tool_call>',
        ('<tool_call>{"arguments": {oops}, "name": "f"}</tool_call>', []),
    ),
    "tags that fail, then a call": (
        f"<<tool_<tool_call> <tool_call>{CALL}",
        ("<<tool_<tool_call> <tool_call>", [("f", '{"a": 1}')]),
    ),
    "a closing tag alone": ("A</tool_call>B", ("A</tool_call>B", [])),
    "a second closing tag": (f"{CALL}</tool_call>", ("</tool_call>", [("f", '{"a": 1}')])),
    "a broken closing tag": (
        '<tool_call>{"name": "f", "arguments": {}}</tool_cal>B',
        ("</tool_cal>B", [("f", "{}")]),
    ),
}

LLAMA_CALL = '{"name": "f", "parameters": {"a": 1}}'

LLAMA3 = {
    "no call": (" Hello\n", (" Hello\n", [])),
    "one call": (LLAMA_CALL, ("", [("f", '{"a": 1}')])),
    "with white space": (f"\n {LLAMA_CALL} \n", ("", [("f", '{"a": 1}')])),
    "with its tag": (f"<|python_tag|>{LLAMA_CALL}", ("", [("f", '{"a": 1}')])),
    "two calls": (f"{LLAMA_CALL}; {LLAMA_CALL}", ("", [("f", '{"a": 1}')] * 2)),
    "three calls": (f"<|python_tag|>{LLAMA_CALL};{LLAMA_CALL}\n;{LLAMA_CALL};", ("", [("f", '{"a": 1}')] * 3)),
    "with a type": ('{"type": "function", "name": "f", "parameters": {}}', ("", [("f", "{}")])),
    "text, then the tag": (f"Look:\n<|python_tag|>{LLAMA_CALL}", ("Look:", [("f", '{"a": 1}')])),
    "text, then JSON": (f"Look: {LLAMA_CALL}", (f"Look: {LLAMA_CALL}", [])),
    "an answer in JSON": ('{"city": "Rome", "n": 1}', ('{"city": "Rome", "n": 1}', [])),
    "a name without parameters": ('{"name": "Rome"}', ('{"name": "Rome"}', [])),
    "a name and more": ('{"name": "Rome", "age": 3}', ('{"name": "Rome", "age": 3}', [])),
    "code after the tag": ("<|python_tag|>print(1)", ("<|python_tag|>print(1)", [])),
    "a partial tag": ("a <|python_", ("a <|python_", [])),
    "text after a call": (f"{LLAMA_CALL} Done.", ("Done.", [("f", '{"a": 1}')])),
    "a second one that is not a call": (f"{LLAMA_CALL}; {{1}}", ("; {1}", [("f", '{"a": 1}')])),
    "cut": ('{"name": "f", "parameters": {"a": {"b": 1}', ("", [("f", '{"a": {"b": 1}')])),
    "cut in the name": ('{"name": "f', ('{"name": "f', [])),
}


def xml(*pairs: tuple[str, str], name: str = "f") -> str:
    values = "".join(f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in pairs)
    return f"<tool_call>\n<function={name}>\n{values}</function>\n</tool_call>"


QWEN = {
    "no call": ("Hi <b>you</b>", ("Hi <b>you</b>", [])),
    "one call": (xml(("text", "a b")), ("", [("f", '{"text": "a b"}')])),
    "text around": (f"A\n{xml(('count', '3'))}\nB", ("A\n\nB", [("f", '{"count": 3}')])),
    "no parameters": (xml(), ("", [("f", "{}")])),
    "two calls": (
        f"{xml(('count', '1'))}\n{xml(('count', '2'))}",
        ("", [("f", '{"count": 1}'), ("f", '{"count": 2}')]),
    ),
    "types": (
        xml(("count", "-3"), ("ratio", "0.5"), ("flag", "True"), ("items", '[1, "a"]'), ("unit", "C")),
        ("", [("f", '{"count": -3, "ratio": 0.5, "flag": true, "items": [1, "a"], "unit": "C"}')]),
    ),
    "null or a number": (xml(("ratio", "null")), ("", [("f", '{"ratio": null}')])),
    "null or a string": (xml(("maybe", "None")), ("", [("f", '{"maybe": null}')])),
    "a string in quotes": (xml(("maybe", '"x"')), ("", [("f", '{"maybe": "\\"x\\""}')])),
    "a string of digits": (xml(("maybe", "12")), ("", [("f", '{"maybe": "12"}')])),
    "a string like JSON": (xml(("text", '{"a": null}')), ("", [("f", '{"text": "{\\"a\\": null}"}')])),
    "not of its type": (xml(("count", "many")), ("", [("f", '{"count": "many"}')])),
    "no number": (xml(("ratio", "NaN")), ("", [("f", '{"ratio": "NaN"}')])),
    "of any type": (xml(("any", "[]"), ("other", "x y")), ("", [("f", '{"any": [], "other": "x y"}')])),
    "an unknown function": (xml(("a", "1"), name="g"), ("", [("g", '{"a": 1}')])),
    "several lines": (xml(("text", "a\n\n  b\n")), ("", [("f", '{"text": "a\\n\\n  b\\n"}')])),
    "an empty string": (xml(("text", "")), ("", [("f", '{"text": ""}')])),
    "tags in a value": (
        xml(("text", "</function>\n</tool_call>\n\n</param <parameter=x>")),
        ("", [("f", '{"text": "</function>\\n</tool_call>\\n\\n</param <parameter=x>"}')]),
    ),
    "on one line": (
        "<tool_call><function=f><parameter=count>1</parameter><parameter=text>é</parameter></function></tool_call>",
        ("", [("f", '{"count": 1, "text": "é"}')]),
    ),
    "an open function": (
        "<tool_call>\n<function=f>\n<parameter=count>\n1\n</parameter>\n</tool_call>!",
        ("!", [("f", '{"count": 1}')]),
    ),
    "text between parameters": (
        "<tool_call><function=f><parameter=count>1</parameter> and</function></tool_call>",
        (" and</function>", [("f", '{"count": 1}')]),
    ),
    "cut in a string": ("<tool_call><function=f><parameter=text>\nab\n</par", ("", [("f", '{"text": "ab')])),
    "cut in a number": ("<tool_call><function=f><parameter=count>\n12", ("", [("f", '{"count": 12')])),
    "cut between": (
        "<tool_call><function=f><parameter=count>1</parameter>\n<para",
        ("", [("f", '{"count": 1')]),
    ),
    "cut in the name": ("A\n<tool_call>\n<function=f", ("A\n<tool_call>\n<function=f", [])),
    "cut before the parameters": ("<tool_call><function=f>\n", ("<tool_call><function=f>\n", [])),
    "not a function": ("<tool_call>\n<f>", ("<tool_call>\n<f>", [])),
    "no name": ("<tool_call><function=></function>", ("<tool_call><function=></function>", [])),
    "neither parameter nor end": ("<tool_call><function=f>x", ("<tool_call><function=f>x", [])),
}

EXAMPLES = [
    pytest.param(make, text, expected, id=f"{make.__name__}: {name}")
    for make, table in ((hermes, HERMES), (llama3, LLAMA3), (qwen, QWEN))
    for name, (text, expected) in table.items()
]


@pytest.mark.parametrize(("make", "text", "expected"), EXAMPLES)
def test_examples(make, text, expected):
    assert read(make(), text) == expected


@pytest.mark.parametrize(("make", "text", "expected"), EXAMPLES)
def test_examples_one_character_at_a_time(make, text, expected):
    parser = make()
    content, calls = join_deltas([*map(parser.feed, text), parser.finish()])
    assert (content, [(call.name, call.arguments) for call in calls]) == expected


@pytest.mark.parametrize(("make", "text", "expected"), EXAMPLES)
def test_what_was_streamed_is_never_taken_back(make, text, expected):
    """Every beginning of a text streams a beginning of what the whole text streams."""
    _, calls = expected
    for length in range(len(text)):
        parser = make()
        delta = parser.feed(text[:length])
        assert expected[0].startswith(delta.content)
        for piece, (name, arguments) in zip(delta.tool_calls, calls, strict=False):
            assert piece.name == name
            assert arguments.startswith(piece.arguments)
        assert len(delta.tool_calls) <= len(calls)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda values: st.lists(values, max_size=3) | st.dictionaries(st.text(), values, max_size=3),
    max_leaves=8,
)
json_calls = st.lists(st.tuples(st.text(min_size=1), st.dictionaries(st.text(), json_values, max_size=3)), max_size=3)
prose = st.text(alphabet=st.sampled_from('<tool_ca>/|py{}":; \nxé🙂')) | st.text()


@st.composite
def cut(draw: st.DrawFn, text: str) -> list[str]:
    """The text in pieces."""
    places = sorted(draw(st.lists(st.integers(0, len(text)), max_size=12)))
    return [text[start:stop] for start, stop in pairwise([0, *places, len(text)])]


def stream(parser: ToolCallParser, pieces: list[str]) -> tuple[str, list[tuple[str, Any]]]:
    content, calls = join_deltas([*map(parser.feed, pieces), parser.finish()])
    return content, [(call.name, call.arguments) for call in calls]


@settings(max_examples=40, deadline=None)
@given(data=st.data(), calls=json_calls, before=st.sampled_from(["", "A <tool_call", "Let me see {} <t"]))
@pytest.mark.parametrize("ascii_only", [True, False])
@pytest.mark.parametrize("style", ["hermes", "llama3"])
def test_calls_that_json_wrote_come_back(style, ascii_only, data, calls, before):
    if style == "hermes":
        bodies = [json.dumps({"name": n, "arguments": a}, ensure_ascii=ascii_only) for n, a in calls]
        text, parser = before + "".join(f"\n<tool_call>\n{body}\n</tool_call>" for body in bodies), hermes()
    else:
        bodies = [json.dumps({"name": n, "parameters": a}, ensure_ascii=ascii_only, indent=1) for n, a in calls]
        text, parser, before = "; ".join(bodies), llama3(), ""
    content, read_calls = stream(parser, data.draw(cut(text)))
    assert content == before
    assert [(name, json.loads(arguments)) for name, arguments in read_calls] == calls


without_ends = st.text(st.characters(exclude_categories=["Cs"])).filter(lambda text: "</parameter>" not in text + "<")
typed_arguments = st.fixed_dictionaries(
    {},
    optional={
        "text": without_ends,
        "count": st.integers(),
        "ratio": st.none() | st.floats(allow_nan=False, allow_infinity=False),
        "flag": st.booleans(),
        "items": st.lists(json_values, max_size=3).filter(lambda items: "</parameter>" not in json.dumps(items)),
    },
)


@settings(max_examples=40, deadline=None)
@given(data=st.data(), calls=st.lists(typed_arguments, max_size=3))
def test_calls_in_xml_come_back(data, calls):
    as_text = [[(k, v if isinstance(v, str) else json.dumps(v)) for k, v in call.items()] for call in calls]
    text = "Well.\n" + "\n".join(xml(*pairs) for pairs in as_text)
    content, read_calls = stream(qwen(), data.draw(cut(text)))
    assert content.rstrip() == "Well."
    assert [(name, json.loads(arguments)) for name, arguments in read_calls] == [("f", call) for call in calls]


@settings(max_examples=60, deadline=None)
@given(data=st.data(), text=prose)
@pytest.mark.parametrize("make", [hermes, llama3, qwen])
def test_text_without_a_call_is_content_to_the_last_character(make, data, text):
    pieces = data.draw(cut(text))
    content, calls = stream(make(), pieces)
    assert calls or content == text


@settings(max_examples=60, deadline=None)
@given(data=st.data(), example=st.sampled_from(EXAMPLES), other=st.sampled_from(EXAMPLES))
def test_how_a_text_is_cut_does_not_matter(data, example, other):
    make, text, _ = example.values
    text = text[: data.draw(st.integers(0, len(text)))] + other.values[1] + data.draw(prose)
    assert stream(make(), data.draw(cut(text))) == read(make(), text)


@pytest.mark.parametrize("make", [hermes, llama3, qwen])
@pytest.mark.parametrize(
    "unit",
    ["<tool_call>", '<tool_call>{"name": "', '{"arguments": [', "<tool_call><function=f>", "\n", "<|python_tag|>{"],
)
def test_hostile_repetition_is_read_once(make, unit):
    """No character is looked at more often than a few times, however many calls seem to begin."""
    text = unit * (20_000 // len(unit))
    content, calls = stream(make(), [text])
    assert content == text
    assert not calls


def test_deltas_are_openai_s():
    parser = hermes()
    assert parser.feed('x<tool_call>{"name": "f", "arguments"').content == "x"
    first = parser.feed(': {"a"')
    second = parser.feed(': 1}}</tool_call><tool_call>{"name": "g"}</tool_call>')
    assert [piece.to_mapping() for piece in first.tool_calls] == [
        {"index": 0, "id": "call_0", "type": "function", "function": {"name": "f", "arguments": '{"a"'}}
    ]
    assert [piece.to_mapping() for piece in second.tool_calls] == [
        {"index": 0, "function": {"arguments": ": 1}"}},
        {"index": 1, "id": "call_1", "type": "function", "function": {"name": "g", "arguments": "{}"}},
    ]
    assert parser.num_calls == 2


def test_ids_differ():
    ids = {call.id for _ in range(3) for call in parse_whole(HermesParser(), CALL + CALL)[1]}
    assert len(ids) == 6
    assert all(id_.startswith("call_") for id_ in ids)
