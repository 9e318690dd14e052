"""Grammars of tool calls, run by llguidance over bytes: what they let through, and that parsers read it back."""

import json
from collections.abc import Sequence

import llguidance
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.errors import RequestError
from headrace.server.tools import FORMATS, FunctionTool, parse_whole
from headrace.server.tools.loose_schema import loosened

TAGS = ["<tool_call>", "</tool_call>", "<|python_tag|>", "<think>", "</think>"]


class Vocabulary:
    """The end, tags, and every byte; the tags special or not, or not in it at all."""

    eos_token_id, bos_token_id = 0, None

    def __init__(self, tags: str) -> None:
        self.tags = {} if tags == "absent" else {text: 1 + index for index, text in enumerate(TAGS)}
        self.special_token_ids = [0, 1, 2, 3, 4, 5] if tags == "special" else [0]
        self.tokens = [b"<eos>", *(tag.encode() for tag in TAGS), *(bytes([byte]) for byte in range(256))]

    def __call__(self, text: str | bytes) -> list[int]:
        return [6 + byte for byte in (text if isinstance(text, bytes) else text.encode())]

    def token_to_id(self, token: str) -> int | None:
        return self.tags.get(token)

    def encode(self, text: str) -> list[int]:
        ids = []
        while text:
            tag = next((tag for tag in self.tags if text.startswith(tag)), text[0])
            ids += [self.tags[tag]] if tag in self.tags else self(tag)
            text = text[len(tag) :]
        return ids


VOCABULARIES = {tags: Vocabulary(tags) for tags in ("special", "ordinary", "absent")}
TOKENIZERS = {
    tags: llguidance.LLTokenizer(llguidance.TokenizerWrapper(vocabulary), eos_token=0)
    for tags, vocabulary in VOCABULARIES.items()
}


def accepts(grammar: str, tags: str, text: str) -> bool:
    """Whether the text may be written, and may end there."""
    assert llguidance.LLMatcher.validate_grammar(llguidance.grammar_from("lark", grammar)) == ""
    matcher = llguidance.LLMatcher(TOKENIZERS[tags], llguidance.grammar_from("lark", grammar))
    ids = VOCABULARIES[tags].encode(text)
    return matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting() and not matcher.is_error()


WEATHER = FunctionTool(
    name="weather",
    parameters={
        "type": "object",
        "properties": {
            "city": {"type": "string"},
            "days": {"type": "integer"},
            "unit": {"enum": ["C", "F"]},
            "tags": {"type": "array", "items": {"$ref": "#/$defs/tag"}},
        },
        "required": ["city"],
        "additionalProperties": False,
        "$defs": {"tag": {"type": "string"}},
    },
)
STRICT = FunctionTool(name="weather", parameters=WEATHER.parameters, strict=True)
NOW = FunctionTool(name="now")

GOOD = {"city": "Rom", "days": 3, "unit": "C", "tags": ["a", "b"]}
BAD = [{"days": 3}, {"city": 1}, {"city": "Rom", "unit": "K"}, {"city": "Rom", "days": "3"}, {"city": "Rom", "x": 1}]


def hermes(name: str, arguments: dict) -> str:
    return f'<tool_call>\n{{"name": "{name}", "arguments": {json.dumps(arguments)}}}\n</tool_call>'


def llama3(name: str, arguments: dict) -> str:
    return f'{{"name": "{name}", "parameters": {json.dumps(arguments)}}}'


def qwen(name: str, arguments: dict) -> str:
    values = {key: value if isinstance(value, str) else json.dumps(value) for key, value in arguments.items()}
    pairs = "".join(f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in values.items())
    return f"<tool_call>\n<function={name}>\n{pairs}</function>\n</tool_call>"


WRITERS = {"hermes": hermes, "llama3": llama3, "qwen": qwen}
SEPARATORS = {"hermes": "\n", "llama3": "; ", "qwen": "\n"}
styles = pytest.mark.parametrize("style", list(WRITERS))
vocabularies = pytest.mark.parametrize("tags", list(VOCABULARIES))


def forced(style: str, tags: str, tools: Sequence[FunctionTool], *, is_single: bool = False) -> str:
    return FORMATS[style].forced_grammar(tools, VOCABULARIES[tags], is_single=is_single)


def free(style: str, tags: str, tools: Sequence[FunctionTool], *, is_single: bool = False) -> str:
    return FORMATS[style].free_grammar(tools, VOCABULARIES[tags], is_single=is_single)


@styles
@vocabularies
def test_a_forced_call_is_a_call_and_nothing_else(style, tags):
    write, grammar = WRITERS[style], forced(style, tags, [WEATHER, NOW])
    call, now = write("weather", GOOD), write("now", {})
    assert accepts(grammar, tags, call)
    assert accepts(grammar, tags, now)
    assert accepts(grammar, tags, now + SEPARATORS[style] + call)
    for text in ("", "Hello", f"Hello {call}", f"{call} Hello", call[:-1], call + call, write("other", {})):
        assert not accepts(grammar, tags, text), text
    assert not accepts(grammar, tags, write("now", {"x": 1}))


@styles
def test_arguments_of_a_forced_call_follow_the_schema(style):
    grammar = forced(style, "special", [WEATHER])
    for arguments in BAD:
        if style == "qwen" and arguments == {"city": 1}:
            continue  # bare text: "1" is a string there
        if style == "qwen" and arguments == {"city": "Rom", "days": "3"}:
            arguments = {"city": "Rom", "days": "three"}
        assert not accepts(grammar, "special", WRITERS[style]("weather", arguments)), arguments


@styles
@vocabularies
def test_one_call_alone(style, tags):
    write, grammar = WRITERS[style], forced(style, tags, [NOW], is_single=True)
    assert accepts(grammar, tags, write("now", {}))
    assert not accepts(grammar, tags, write("now", {}) + SEPARATORS[style] + write("now", {}))


@styles
@vocabularies
def test_free_text_with_strict_calls(style, tags):
    write, grammar = WRITERS[style], free(style, tags, [STRICT, NOW])
    good, bad = write("weather", GOOD), write("weather", {"days": 3})
    for text in ("", "Hello <b> tool_call }", good, f"{good}{SEPARATORS[style]}{write('now', {})}"):
        assert accepts(grammar, tags, text), text
    assert not accepts(grammar, tags, bad)
    assert not accepts(grammar, tags, write("other", {}))
    assert not accepts(grammar, tags, good + SEPARATORS[style] + bad)
    if style == "llama3":
        assert not accepts(grammar, tags, '\n{"city": "Rom"}')
        assert accepts(grammar, tags, "<|python_tag|>" + good)
        assert not accepts(grammar, tags, "Look: <|python_tag|>" + bad)
    else:
        assert accepts(grammar, tags, f"Look:\n{good}\nThat is it.")
        assert accepts(grammar, tags, f"<think>\nWell\n</think>\n{good}")
        assert not accepts(grammar, tags, f"<think>\nWell\n</think>\n{bad}")
        assert not accepts(grammar, tags, f"Look:\n{bad}")


@styles
@vocabularies
def test_at_most_one_call_in_free_text(style, tags):
    write, grammar = WRITERS[style], free(style, tags, [NOW], is_single=True)
    now = write("now", {})
    assert accepts(grammar, tags, "Hello")
    assert accepts(grammar, tags, now)
    assert not accepts(grammar, tags, now + SEPARATORS[style] + now)
    if style != "llama3":
        assert accepts(grammar, tags, f"<think>\nWell\n</think>\n{now}")
        assert not accepts(grammar, tags, f"<think>\nWell\n</think>\n{now}{now}")


@styles
def test_calls_that_are_not_strict_are_free_where_nobody_forces_them(style):
    grammar = free(style, "special", [WEATHER, FunctionTool(name="s", strict=True)])
    assert accepts(grammar, "special", WRITERS[style]("weather", {"days": "three", "x": 1}))


LOOSE = {
    "a format": ({"type": "string", "format": "binary"}, ["x"], [1]),
    "a word of nobody": ({"type": "integer", "nullable": True, "x-y": 1}, [1], ["x"]),
    "one of several": ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, [1, 1.5], ["x"]),
    "nested": ({"type": "array", "items": {"not": {}, "enum": [1]}}, [[1, 1]], [[2]]),
    "named": ({"$ref": "#/$defs/x"}, [1], ["1"]),
}


@pytest.mark.parametrize(("schema", "good", "bad"), list(LOOSE.values()), ids=list(LOOSE))
def test_what_cannot_be_enforced_binds_strict_functions_alone(schema, good, bad):
    root = {"type": "object", "properties": {"a": schema}, "required": ["a"], "$defs": {"x": {"enum": [1], "if": {}}}}
    grammar = forced("hermes", "special", [FunctionTool(name="f", parameters=root)])
    assert [accepts(grammar, "special", hermes("f", {"a": value})) for value in good] == [True] * len(good)
    assert [accepts(grammar, "special", hermes("f", {"a": value})) for value in bad] == [False] * len(bad)
    strict = forced("hermes", "special", [FunctionTool(name="f", parameters=root, strict=True)])
    assert json.dumps(schema) in strict


def test_schemas_without_end_are_loosened_to_one():
    schema = {}
    for _ in range(200):
        schema = {"type": "array", "items": schema}
    assert json.dumps(loosened(schema)).count("array") == 48


def test_a_schema_cannot_write_grammar():
    key, value = 'a"} | /.*/ \n start: /.*/ #', '"\n%json {"'
    for write, style in ((hermes, "hermes"), (qwen, "qwen")):
        key = key if style == "hermes" else key.replace("\n", "")
        schema = {"properties": {key: {"const": value}}, "required": [key]}
        grammar = forced(style, "special", [FunctionTool(name="f", parameters=schema)])
        assert accepts(grammar, "special", write("f", {key: value}))
        assert not accepts(grammar, "special", write("f", {key: "x"}))


QWEN_VALUES = {
    "text of several lines": ({"type": "string"}, "a\n<b>\n\n{", True),
    "empty": ({"type": "string"}, "", True),
    "a number": ({"type": "number"}, 1.5, True),
    "no number": ({"type": "number"}, "x", False),
    "of a list": ({"enum": ["a", 1, None]}, 1, True),
    "not of a list": ({"enum": ["a", 1, None]}, 2, False),
    "constant": ({"const": {"a": 1}}, {"a": 1}, True),
    "null": ({"type": ["integer", "null"]}, None, True),
    "object": ({"$ref": "#/$defs/o"}, {"k": [1]}, True),
    "not that object": ({"$ref": "#/$defs/o"}, {"k": [""]}, False),
    "anything": ({}, "x", True),
}


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize(("schema", "value", "is_allowed"), list(QWEN_VALUES.values()), ids=list(QWEN_VALUES))
def test_values_in_xml(schema, value, is_allowed, strict):
    defs = {"o": {"type": "object", "properties": {"k": {"type": "array", "items": {"type": "integer"}}}}}
    tool = FunctionTool(name="f", parameters={"properties": {"v": schema}, "$defs": defs}, strict=strict)
    assert accepts(forced("qwen", "special", [tool]), "special", qwen("f", {"v": value})) is is_allowed


def test_a_function_of_any_parameters_in_xml():
    grammar = forced("qwen", "special", [FunctionTool(name="f", parameters={})])
    assert accepts(grammar, "special", qwen("f", {"a": 1, "b c": "x"}))
    grammar = forced("qwen", "special", [FunctionTool(name="f", parameters={"required": ["a"]})])
    assert accepts(grammar, "special", qwen("f", {"a": 1}))
    assert not accepts(grammar, "special", qwen("f", {}))


@pytest.mark.parametrize(
    ("parameters", "strict", "named"),
    [
        ({"properties": {"a": {"type": "string", "pattern": "x"}}}, True, "'pattern'"),
        ({"properties": {"a": {"type": "string"}}, "anyOf": [{}]}, True, "'anyOf'"),
        ({"anyOf": [{}]}, False, "'anyOf'"),
        ({"properties": {"a>": {"type": "string"}}}, False, "'a>'"),
        ({"properties": {"a": {"const": "</parameter>"}}}, False, "'a'"),
    ],
)
def test_what_xml_cannot_be_held_to_is_refused(parameters, strict, named):
    tool = FunctionTool(name="f", parameters=parameters, strict=strict)
    with pytest.raises(RequestError, match=named):
        forced("qwen", "special", [tool])


def test_what_xml_cannot_be_held_to_is_left_out_where_it_was_not_promised():
    parameters = {"properties": {"a": {"type": "string", "pattern": "x"}}, "anyOf": [{}]}
    assert accepts(
        forced("qwen", "special", [FunctionTool(name="f", parameters=parameters)]), "special", qwen("f", {"a": "y"})
    )


@settings(max_examples=25, deadline=None)
@given(city=st.text(st.characters(exclude_categories=["Cs", "Cc"])), days=st.none() | st.integers(-99, 99))
@styles
def test_what_a_grammar_lets_through_its_parser_reads(style, city, days):
    arguments = {"city": city} if days is None else {"city": city, "days": days}
    text = WRITERS[style]("weather", arguments)
    if "</parameter>" in city or not accepts(forced(style, "special", [WEATHER]), "special", text):
        assert "\\u" in text or "</parameter>" in city  # llguidance writes characters, not escapes
        return
    content, [call] = parse_whole(FORMATS[style].make_parser([WEATHER]), text)
    assert (content, call.name, json.loads(call.arguments)) == ("", "weather", arguments)
