"""Tools of chats and responses through the official client: a small model that is made to call."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.serving import demo_with_template, engine_settings, running_server

TEMPLATE = """
{%- for tool in tools or [] %}{{- '<|system|>' + tool.function.name + '<|end|>' }}{%- endfor %}
{%- for message in messages %}
    {{- '<|' + (message.role if message.role != 'tool' else 'user') + '|>' + (message.content or '') | trim }}
    {%- for call in message.tool_calls or [] %}{{- call.function.arguments.city }}{%- endfor %}
    {{- '<|end|>' -}}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|assistant|>' }}{%- endif %}
"""
MESSAGES = [{"role": "user", "content": "What is the weather in Rome?"}]
PARAMETERS = {
    "type": "object",
    "properties": {"city": {"enum": ["Rome", "Oslo"]}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["city"],
    "additionalProperties": False,
}
WEATHER = {"name": "weather", "parameters": PARAMETERS}
TOOLS = [{"type": "function", "function": WEATHER}, {"type": "function", "function": {"name": "now"}}]
FLAT_TOOLS = [{"type": "function", **tool["function"]} for tool in TOOLS]
NAMED = {"type": "function", "function": {"name": "weather"}}
SETTINGS: dict[str, Any] = {"model": "demo", "messages": MESSAGES, "tools": TOOLS, "max_tokens": 160}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model, told of tools."""
    return demo_with_template(tmp_path_factory.mktemp("models") / "demo", TEMPLATE)


@pytest.fixture(scope="module", params=["hermes", "llama3", "qwen"])
def client(request: pytest.FixtureRequest, folder: Path) -> Iterator[openai.OpenAI]:
    with (
        running_server(engine_settings(folder), tool_format=request.param) as server,
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as made,
    ):
        yield made


def check_weather(arguments: str) -> None:
    given = json.loads(arguments)
    assert given.keys() <= {"city", "days"}
    assert given["city"] in ("Rome", "Oslo")
    assert isinstance(given.get("days", 1), int)
    assert 1 <= given.get("days", 1) <= 9


@pytest.mark.parametrize("seed", [1, 2])
def test_a_named_function_is_called_once(client: openai.OpenAI, seed: int) -> None:
    [choice] = client.chat.completions.create(**SETTINGS, tool_choice=NAMED, seed=seed).choices
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content is None
    [call] = choice.message.tool_calls
    assert (call.type, call.function.name) == ("function", "weather")
    assert call.id.startswith("call_")
    check_weather(call.function.arguments)


def test_a_streamed_call_is_the_same_in_pieces(client: openai.OpenAI) -> None:
    settings = {**SETTINGS, "tool_choice": "required", "parallel_tool_calls": False, "seed": 7}
    [whole] = client.chat.completions.create(**settings).choices
    with client.chat.completions.stream(**settings) as stream:
        chunks = [event.chunk for event in stream if event.type == "chunk"]
        [streamed] = stream.get_final_completion().choices
    assert streamed.finish_reason == whole.finish_reason == "tool_calls"
    [call], [expected] = streamed.message.tool_calls, whole.message.tool_calls
    assert (call.function.name, call.function.arguments) == (expected.function.name, expected.function.arguments)
    pieces = [piece for chunk in chunks for choice in chunk.choices for piece in choice.delta.tool_calls or []]
    assert [piece.index for piece in pieces] == [0] * len(pieces)
    assert [bool(piece.id) for piece in pieces] == [True] + [False] * (len(pieces) - 1)
    if call.function.arguments != "{}":
        assert len(pieces) > 1


def test_each_choice_has_calls_of_its_own(client: openai.OpenAI) -> None:
    settings = {**SETTINGS, "tool_choice": NAMED, "seed": 3, "n": 3, "temperature": 1.5}
    choices = client.chat.completions.create(**settings).choices
    assert len({call.id for choice in choices for call in choice.message.tool_calls}) == 3
    arguments = ["", "", ""]
    for chunk in client.chat.completions.create(**settings, stream=True):
        for choice in chunk.choices:
            arguments[choice.index] += "".join(p.function.arguments for p in choice.delta.tool_calls or [])
    assert arguments == [choice.message.tool_calls[0].function.arguments for choice in choices]
    for one in arguments:
        check_weather(one)


def test_several_calls_have_an_index_each(client: openai.OpenAI) -> None:
    for seed in range(3):
        [choice] = client.chat.completions.create(
            **SETTINGS, tool_choice="required", seed=seed, temperature=1.3
        ).choices
        calls = choice.message.tool_calls
        assert calls
        assert choice.finish_reason in ("tool_calls", "length")
        whole = calls if choice.finish_reason == "tool_calls" else calls[:-1]
        for call in whole:
            if call.function.name == "weather":
                check_weather(call.function.arguments)
            else:
                assert (call.function.name, json.loads(call.function.arguments)) == ("now", {})


def test_nothing_is_called_where_nothing_may_be(client: openai.OpenAI) -> None:
    settings = {"model": "demo", "messages": MESSAGES, "temperature": 0, "max_tokens": 12}
    plain = client.chat.completions.create(**settings).choices[0]
    none = client.chat.completions.create(**settings, tools=TOOLS, tool_choice="none").choices[0]
    assert none.message.content == plain.message.content
    assert none.message.tool_calls is None


def test_free_text_is_told_of_tools_and_kept(client: openai.OpenAI) -> None:
    settings = {**SETTINGS, "temperature": 0, "max_tokens": 24}
    free = client.chat.completions.create(**settings).choices[0]
    strict = [{"type": "function", "function": {**WEATHER, "strict": True}}, TOOLS[1]]
    bound = client.chat.completions.create(**{**settings, "tools": strict}).choices[0]
    assert free.message.content
    assert bound.message.content == free.message.content
    assert bound.message.tool_calls is None


def test_a_call_and_its_result_go_back(client: openai.OpenAI) -> None:
    [choice] = client.chat.completions.create(**SETTINGS, tool_choice=NAMED, seed=1).choices
    call = choice.message.tool_calls[0]
    result = {"role": "tool", "tool_call_id": call.id, "content": "Sunny"}
    messages = [*MESSAGES, choice.message.model_dump(exclude_none=True), result]
    answer = client.chat.completions.create(**{**SETTINGS, "messages": messages, "max_tokens": 4})
    assert answer.choices[0].message.content
    broken = {**choice.message.model_dump(exclude_none=True)}
    broken["tool_calls"] = [{**call.model_dump(), "function": {"name": "weather", "arguments": "{oops"}}]
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(**{**SETTINGS, "messages": [*MESSAGES, broken, result]})
    assert refused.value.param == "messages[1].tool_calls[0].function.arguments"


def test_what_cannot_be_enforced_is_refused_before_it_runs(client: openai.OpenAI) -> None:
    parameters = {"type": "object", "properties": {"a": {"type": "integer", "not": {"const": 1}}}}
    tools = [{"type": "function", "function": {"name": "f", "parameters": parameters, "strict": True}}]
    with pytest.raises(openai.BadRequestError, match="'not'") as refused:
        client.chat.completions.create(**{**SETTINGS, "tools": tools})
    assert refused.value.param == "tools[0].function.parameters"


def test_a_response_calls_a_function(client: openai.OpenAI) -> None:
    settings: dict[str, Any] = {
        "model": "demo",
        "input": "Weather in Rome?",
        "tools": FLAT_TOOLS,
        "tool_choice": {"type": "function", "name": "weather"},
        "extra_body": {"seed": 4},
    }
    response = client.responses.create(**settings)
    [item] = response.output
    assert (item.type, item.name, item.status, response.status) == (
        "function_call",
        "weather",
        "completed",
        "completed",
    )
    check_weather(item.arguments)
    events = list(client.responses.create(**settings, stream=True))
    deltas = [event.delta for event in events if event.type == "response.function_call_arguments.delta"]
    [done] = [event for event in events if event.type == "response.function_call_arguments.done"]
    assert "".join(deltas) == done.arguments == item.arguments
    assert events[-1].response.output[0].arguments == item.arguments
    result = {"type": "function_call_output", "call_id": item.call_id, "output": "Sunny"}
    items = [{"role": "user", "content": "Weather in Rome?"}, item.model_dump(exclude_none=True), result]
    assert client.responses.create(model="demo", input=items, max_output_tokens=2).output_text is not None


def test_a_response_has_its_form(client: openai.OpenAI) -> None:
    form = {"type": "json_schema", "name": "place", "schema": PARAMETERS, "strict": True}
    response = client.responses.create(model="demo", input="Where?", text={"format": form})
    check_weather(response.output_text)
    assert response.text.format.schema_ == PARAMETERS


def test_a_model_that_is_not_told_of_tools_refuses_them() -> None:
    with (
        running_server() as server,
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client,
    ):
        with pytest.raises(openai.BadRequestError, match="does not tell it of tools") as refused:
            client.chat.completions.create(**SETTINGS)
        assert refused.value.param == "tools"
        assert client.chat.completions.create(**{**SETTINGS, "max_tokens": 1}, tool_choice="none").choices
