"""Tool calls forced as forms of the output: grammars with inline schemas, compiled over real tokenizers."""

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken

from headrace.config import SamplingParams, StructuredOutputs
from headrace.engine.grammar_compiler import GrammarCompiler
from headrace.errors import RequestError
from headrace.server.tools import FORMATS, parse_tool_choice, parse_tools, parse_whole, plan_tools
from headrace.tokenizer import Tokenizer
from tests.tiny_tokenizers import byte_level_bpe, write_folder

TAGS = ["<tool_call>", "</tool_call>", "<|python_tag|>", "<think>", "</think>"]
PARAMETERS = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "days": {"$ref": "#/$defs/days"}},
    "required": ["city"],
    "additionalProperties": False,
    "$defs": {"days": {"type": "integer", "minimum": 1, "maximum": 9}},
}
TOOLS = [
    {"type": "function", "function": {"name": "weather", "parameters": PARAMETERS, "strict": True}},
    {"type": "function", "function": {"name": "now"}},
]
END = 2


@pytest.fixture(scope="module", params=["special", "added", "absent"])
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """Tags as special tokens, as tokens that are not special (Qwen's), or as text."""
    made = byte_level_bpe()
    if request.param != "absent":
        is_special = request.param == "special"
        made.add_tokens([AddedToken(tag, special=is_special, normalized=False) for tag in TAGS])
    folder: Path = tmp_path_factory.mktemp("tokenizers") / request.param
    return Tokenizer.from_folder(write_folder(folder, made))


def form_of(tokenizer: Tokenizer, style: str, choice: Any, parallel: bool | None = None) -> StructuredOutputs:
    found = parse_tool_choice(choice, parse_tools(TOOLS), parallel)
    params = plan_tools(found, FORMATS[style], tokenizer, shows_tools=True).apply(SamplingParams())
    assert params.structured_outputs is not None
    return params.structured_outputs


def accepts(tokenizer: Tokenizer, form: StructuredOutputs, text: str) -> bool:
    matcher = GrammarCompiler(tokenizer, tokenizer.vocab_size, [END]).compile(form).matcher()
    for token_id in tokenizer.encode(text, add_special_tokens=False):
        if not int.from_bytes(matcher.mask, "little") >> token_id & 1:
            return False
        matcher.accept(token_id)
    return bool(int.from_bytes(matcher.mask, "little") >> END & 1)


def call(style: str, name: str, arguments: dict[str, Any]) -> str:
    if style == "qwen":
        pairs = "".join(f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in arguments.items())
        return f"<tool_call>\n<function={name}>\n{pairs}</function>\n</tool_call>"
    if style == "hermes":
        return f'<tool_call>\n{{"name": "{name}", "arguments": {json.dumps(arguments)}}}\n</tool_call>'
    return f'{{"name": "{name}", "parameters": {json.dumps(arguments)}}}'


styles = pytest.mark.parametrize("style", list(FORMATS))


@styles
def test_forced_calls(tokenizer: Tokenizer, style: str) -> None:
    required = form_of(tokenizer, style, "required")
    good = call(style, "weather", {"city": "Rome", "days": 3})
    separator = "; " if style == "llama3" else "\n"
    assert accepts(tokenizer, required, good)
    assert accepts(tokenizer, required, good + separator + call(style, "now", {}))
    for text in ("Hello", f"Hello {good}", call(style, "weather", {"days": 3}), call(style, "now", {"x": 1})):
        assert not accepts(tokenizer, required, text)
    assert not accepts(tokenizer, required, call(style, "weather", {"city": "Rome", "days": 10}))
    named = form_of(tokenizer, style, {"type": "function", "function": {"name": "now"}})
    assert accepts(tokenizer, named, call(style, "now", {}))
    assert not accepts(tokenizer, named, good)
    assert not accepts(tokenizer, named, call(style, "now", {}) + separator + call(style, "now", {}))


@styles
def test_free_text_with_strict_calls(tokenizer: Tokenizer, style: str) -> None:
    form = form_of(tokenizer, style, "auto")
    good, bad = (call(style, "weather", arguments) for arguments in ({"city": "Rome"}, {"days": 3}))
    assert accepts(tokenizer, form, "the quick <brown> fox")
    assert accepts(tokenizer, form, good)
    assert not accepts(tokenizer, form, bad)
    if style != "llama3":
        assert accepts(tokenizer, form, f"<think>\nwell\n</think>\nhello\n{good}\nhello")
        assert not accepts(tokenizer, form, f"hello\n{bad}")
    single = form_of(tokenizer, style, "auto", parallel=False)
    assert accepts(tokenizer, single, good)
    assert not accepts(tokenizer, single, good + ("; " if style == "llama3" else "\n") + good)


@styles
def test_many_tools_are_compiled(tokenizer: Tokenizer, style: str) -> None:
    tools = parse_tools(
        [{"type": "function", "function": {"name": f"f{i}", "parameters": PARAMETERS}} for i in range(64)]
    )
    plan = plan_tools(parse_tool_choice("required", tools), FORMATS[style], tokenizer, shows_tools=True)
    form = plan.apply(SamplingParams()).structured_outputs
    assert form is not None
    text = call(style, "f63", {"city": "Rome"})
    assert accepts(tokenizer, form, text)
    content, [found] = parse_whole(FORMATS[style].make_parser(tools), text)
    assert (content, found.name, json.loads(found.arguments)) == ("", "f63", {"city": "Rome"})


@styles
def test_arguments_are_written_on_one_line(tokenizer: Tokenizer, style: str) -> None:
    if style == "qwen":
        return  # its values are bare
    form = form_of(tokenizer, style, "required")
    good = call(style, "weather", {"city": "Rome", "days": 3})
    assert accepts(tokenizer, form, good.replace('": ', '":').replace('"name":', '"name": ').replace('s":{', 's": {'))
    assert not accepts(tokenizer, form, good.replace("3}", "3\n}"))


def test_what_cannot_be_enforced_is_refused_of_strict_functions_alone(tokenizer: Tokenizer) -> None:
    parameters = {"properties": {"a": {"type": "string", "format": "binary", "nullable": True}}, "required": ["a"]}
    for strict in (False, True):
        tools = parse_tools(
            [{"type": "function", "function": {"name": "f", "parameters": parameters, "strict": strict}}]
        )
        plan = plan_tools(parse_tool_choice("required", tools), FORMATS["hermes"], tokenizer, shows_tools=True)
        form = plan.apply(SamplingParams()).structured_outputs
        assert form is not None
        if strict:
            with pytest.raises(RequestError, match="nullable"):
                accepts(tokenizer, form, "")
        else:
            assert accepts(tokenizer, form, call("hermes", "f", {"a": "x"}))
