"""`/v1/responses` through the official client, beside the engine itself and with its own reader of events."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from openai.lib.streaming.responses._responses import ResponseStreamState
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

from headrace import LLM, SamplingParams
from headrace.engine.outputs import CompletionChunk, CompletionOutput
from headrace.server.encoding import usage_object
from headrace.server.errors import InvalidParameter, ServerError
from headrace.server.protocol.responses import ResponsesRequest
from headrace.server.responses.answer import Answer
from headrace.server.responses.conversation import make_messages
from headrace.server.tools import FORMATS, FunctionTool, ToolPlan
from tests.serving import RunningServer, demo_with_template, engine_settings, running_server

pytest_plugins = ["tests.server_fixtures"]

QUESTION = "What is the largest ocean?"
TEMPLATE = """
{%- if tools %}{{- '<|system|>' }}{%- for tool in tools %}{{- tool | tojson }}{%- endfor %}
{{- '<tool_call>{"name": "", "arguments": {}}</tool_call><|end|>' }}{%- endif %}
{%- for message in messages %}
    {{- '<|' + (message.role if message.role != 'tool' else 'user') + '|>' + (message.content or '') | trim }}
    {%- for call in message.tool_calls or [] %}{{- call.function.arguments.city }}{%- endfor %}
    {{- '<|end|>' -}}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|assistant|>' }}{%- endif %}
"""
WEATHER = {
    "type": "function",
    "name": "weather",
    "parameters": {"type": "object", "properties": {"city": {"enum": ["Rome", "Oslo"]}}, "required": ["city"]},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model, told of tools."""
    return demo_with_template(tmp_path_factory.mktemp("models") / "demo", TEMPLATE)


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[RunningServer]:
    with running_server(engine_settings(folder)) as running:
        yield running


@pytest.fixture(scope="module")
def llm(folder: Path) -> Iterator[LLM]:
    with LLM(folder, num_threads=1, dataflow="default") as made:
        yield made


def answer_of(llm: LLM, messages: list[dict[str, str]], **params: Any) -> Any:
    [output] = llm.chat(messages, SamplingParams(**{"temperature": 0, "max_tokens": None, **params}))
    return output


def test_a_response_is_what_the_engine_answers(client: openai.OpenAI, llm: LLM) -> None:
    response = client.responses.create(model="demo", input=QUESTION, temperature=0, metadata={"a": "b"})
    expected = answer_of(llm, [{"role": "user", "content": QUESTION}])
    assert response.output_text == expected.outputs[0].text
    assert (response.status, response.object, response.error) == ("completed", "response", None)
    assert response.output[0].status == "completed"
    assert response.metadata == {"a": "b"}
    assert response.created_at <= response.completed_at
    assert response.temperature == 0
    assert response.usage is not None
    assert response.usage.input_tokens == len(expected.prompt_token_ids)
    assert response.usage.output_tokens == len(expected.outputs[0].token_ids)
    assert response.usage.total_tokens == response.usage.input_tokens + response.usage.output_tokens
    assert Response.model_validate(response.model_dump(), strict=False)


def test_items_and_instructions_are_one_conversation(client: openai.OpenAI, llm: LLM) -> None:
    items = [
        {"role": "user", "content": [{"type": "input_text", "text": "Hello."}]},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "Hi."}]},
        {"role": "user", "content": QUESTION},
    ]
    response = client.responses.create(model="demo", input=items, instructions="Be brief.", temperature=0)
    expected = answer_of(
        llm,
        [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Hello."},
            {"role": "assistant", "content": "Hi."},
            {"role": "user", "content": QUESTION},
        ],
    )
    assert response.output_text == expected.outputs[0].text


def test_an_answer_goes_back_as_input(client: openai.OpenAI) -> None:
    first = client.responses.create(model="demo", input=QUESTION, max_output_tokens=4)
    items = [{"role": "user", "content": QUESTION}, *(item.model_dump(exclude_none=True) for item in first.output)]
    second = client.responses.create(model="demo", input=[*items, {"role": "user", "content": "Why?"}], top_p=0.5)
    assert second.status == "completed"
    assert second.top_p == 0.5


def likely(entries: Any) -> list[tuple[str, float, list[tuple[str, float]]]]:
    """Of each token: its text, its log probability, and those of the most likely ones."""
    return [(e.token, e.logprob, [(top.token, top.logprob) for top in e.top_logprobs]) for e in entries]


@pytest.mark.parametrize("num_top", [0, 2])
def test_log_probabilities_of_a_text_are_the_engine_s(client: openai.OpenAI, llm: LLM, num_top: int) -> None:
    settings = {"model": "demo", "input": QUESTION, "temperature": 0, "include": ["message.output_text.logprobs"]}
    expected = answer_of(llm, [{"role": "user", "content": QUESTION}], logprobs=num_top).outputs[0]
    by_rank = [sorted(entries.values(), key=lambda e: e.rank)[:num_top] for entries in expected.logprobs]
    values = [
        (
            entries[token_id].decoded_token,
            pytest.approx(entries[token_id].logprob, abs=1e-5),
            [(e.decoded_token, pytest.approx(e.logprob, abs=1e-5)) for e in top],
        )
        for token_id, entries, top in zip(expected.token_ids, expected.logprobs, by_rank, strict=True)
    ]
    whole = client.responses.create(**settings, top_logprobs=num_top)
    assert likely(whole.output[0].content[0].logprobs) == values
    assert whole.top_logprobs == num_top
    events = list(client.responses.create(**settings, top_logprobs=num_top, stream=True))
    deltas = [event for event in events if event.type == "response.output_text.delta"]
    told = [entry for event in deltas for entry in likely(event.logprobs)]
    # The last token, which ends the text, has none.
    assert told == values[: len(told)]
    assert len(told) >= len(values) - 1
    [done] = [event for event in events if event.type == "response.output_text.done"]
    assert likely(done.logprobs) == likely(events[-1].response.output[0].content[0].logprobs) == values


def test_a_stream_tells_of_everything_in_order(client: openai.OpenAI) -> None:
    whole = client.responses.create(model="demo", input=QUESTION, temperature=0)
    events = list(client.responses.create(model="demo", input=QUESTION, temperature=0, stream=True))
    kinds = [event.type for event in events]
    assert kinds[:4] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
    ]
    assert set(kinds[4:-4]) == {"response.output_text.delta"}
    assert kinds[-4:] == [
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
    ]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert "".join(event.delta for event in events[4:-4]) == whole.output_text
    assert events[-4].text == whole.output_text
    assert events[-1].response.output_text == whole.output_text
    assert events[-1].response.usage == whole.usage.model_copy(
        update={"input_tokens_details": events[-1].response.usage.input_tokens_details}
    )


def test_the_client_s_own_stream_agrees(client: openai.OpenAI) -> None:
    with client.responses.stream(model="demo", input=QUESTION, temperature=0) as stream:
        final = stream.get_final_response()
    assert final.output_text == client.responses.create(model="demo", input=QUESTION, temperature=0).output_text


def test_an_answer_that_was_cut_is_incomplete(client: openai.OpenAI) -> None:
    whole = client.responses.create(model="demo", input=QUESTION, max_output_tokens=3, temperature=0)
    assert whole.status == whole.output[0].status == "incomplete"
    assert whole.incomplete_details.reason == "max_output_tokens"
    assert whole.usage.output_tokens == 3
    assert whole.completed_at is None
    events = list(
        client.responses.create(model="demo", input=QUESTION, max_output_tokens=3, temperature=0, stream=True)
    )
    assert events[-1].type == "response.incomplete"
    assert events[-1].response.output_text == whole.output_text


def test_a_seed_fixes_a_response(client: openai.OpenAI) -> None:
    settings = {"model": "demo", "input": QUESTION, "temperature": 1.5, "max_output_tokens": 12}
    texts = {client.responses.create(**settings, extra_body={"seed": seed}).output_text for seed in (1, 1, 2, 3)}
    assert 1 < len(texts) < 4


@pytest.mark.parametrize(
    ("settings", "param"),
    [
        ({"store": True}, "store"),
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"background": True}, "background"),
        ({"reasoning": {"effort": "low"}}, "reasoning"),
        ({"include": ["reasoning.encrypted_content"]}, "include"),
        ({"include": ["message.output_text.logprobs"], "tools": [WEATHER]}, "include"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"include": ["message.output_text.logprobs"], "top_logprobs": 21}, "top_logprobs"),
        ({"truncation": "auto"}, "truncation"),
        ({"text": {"verbosity": "low"}}, "text"),
        ({"text": {"format": {"type": "json_schema", "name": "a"}}}, "text.format.schema"),
        ({"extra_body": {"no_such_field": 1}}, "no_such_field"),
        ({"extra_body": {"stream_options": {}}}, "stream_options"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"input": []}, "input"),
        ({"input": [{"type": "reasoning", "summary": []}]}, "input[0].type"),
        ({"input": [{"role": "critic", "content": "x"}]}, "input[0].role"),
        ({"input": [{"role": "user", "content": "x", "name": "y"}]}, "input[0]"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input[0].content[0]"),
        ({"input": [{"type": "function_call", "call_id": "c", "name": "f", "arguments": "["}]}, "input[0].arguments"),
        ({"input": [{"type": "function_call_output", "output": "x"}]}, "input[0].call_id"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"tools": [WEATHER], "tool_choice": {"type": "function", "name": "f"}}, "tool_choice"),
        ({"tools": [WEATHER], "text": {"format": {"type": "json_object"}}}, "tools"),
    ],
)
def test_a_wrong_field_is_named(client: openai.OpenAI, settings: dict[str, Any], param: str) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        client.responses.create(**{"model": "demo", "input": QUESTION, **settings})
    named = refused.value.param or ""
    assert named.startswith(param)
    assert named.split(".")[-1] in refused.value.message


def test_a_form_that_cannot_be_compiled_is_named(client: openai.OpenAI) -> None:
    form = {"type": "json_schema", "name": "a", "schema": {"type": "object", "uniqueItems": True, "not": {}}}
    with pytest.raises(openai.BadRequestError, match="cannot be enforced") as refused:
        client.responses.create(model="demo", input=QUESTION, text={"format": form})
    assert refused.value.param == "text.format"


def test_defaults_that_ask_for_nothing_are_served(client: openai.OpenAI) -> None:
    response = client.responses.create(
        model="demo",
        input=QUESTION,
        max_output_tokens=1,
        store=False,
        background=False,
        truncation="disabled",
        service_tier="auto",
        include=[],
        tools=[],
        tool_choice="auto",
        parallel_tool_calls=True,
        text={"format": {"type": "text"}},
        user="me",
    )
    assert response.store is False
    assert response.user == "me"
    assert response.text.format.type == "text"


def test_calls_and_results_become_messages() -> None:
    call = {"type": "function_call", "call_id": "1", "name": "f", "arguments": '{"a": 1}', "status": "completed"}
    other = {"type": "function_call", "call_id": "2", "name": "g", "arguments": "", "id": "fc_2"}
    results = [
        {"type": "function_call_output", "call_id": "1", "output": "x"},
        {"type": "function_call_output", "call_id": "2", "output": [{"type": "input_text", "text": "y"}]},
    ]
    messages = make_messages([{"role": "user", "content": "q"}, call, other, *results], None)
    calls = [
        {"id": "1", "type": "function", "function": {"name": "f", "arguments": {"a": 1}}},
        {"id": "2", "type": "function", "function": {"name": "g", "arguments": {}}},
    ]
    assert messages == [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": None, "tool_calls": calls},
        {"role": "tool", "tool_call_id": "1", "content": "x"},
        {"role": "tool", "tool_call_id": "2", "content": "y"},
    ]
    [with_text, _] = make_messages([{"role": "assistant", "content": "Wait."}, call, results[0]], None)
    assert with_text == {"role": "assistant", "content": "Wait.", "tool_calls": calls[:1]}
    assert make_messages([{"role": "developer", "content": "x"}], None) == [{"role": "system", "content": "x"}]
    with pytest.raises(InvalidParameter, match=r"input\[1\].output must be a string"):
        make_messages([call, {"type": "function_call_output", "call_id": "1", "output": None}], None)


def test_a_conversation_with_calls_reaches_the_template(client: openai.OpenAI) -> None:
    items = [
        {"role": "user", "content": "Weather?"},
        {"type": "function_call", "call_id": "1", "name": "weather", "arguments": '{"city": "Rome"}'},
        {"type": "function_call_output", "call_id": "1", "output": "Sunny"},
    ]
    plain = client.responses.create(model="demo", input=items, max_output_tokens=1)
    told = client.responses.create(model="demo", input=items, tools=[WEATHER], max_output_tokens=1)
    unused = client.responses.create(
        model="demo", input=items, tools=[WEATHER], tool_choice="none", max_output_tokens=1
    )
    assert told.usage.input_tokens > plain.usage.input_tokens == unused.usage.input_tokens
    assert told.tools[0].name == "weather"


EVENT: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)
TEXTS = {
    "text": ("Hello\n", ["Hello\n"]),
    "nothing": ("", [""]),
    "a call": (
        '<tool_call>{"name": "weather", "arguments": {"city": "Rome"}}</tool_call>',
        [("weather", '{"city": "Rome"}')],
    ),
    "text and calls": (
        'Wait.\n<tool_call>{"name": "a", "arguments": {}}</tool_call>\n'
        '<tool_call>{"name": "b", "arguments": {"x": "é"}}</tool_call>\nDone. \n',
        ["Wait.", ("a", "{}"), ("b", '{"x": "é"}'), "Done."],
    ),
    "no call after all": ('Wait <tool_call>{"name', ['Wait <tool_call>{"name']),
}


def scripted(tools: bool = True) -> Answer:
    plan = ToolPlan(tools=(FunctionTool(name="weather"),), format=FORMATS["hermes"]) if tools else ToolPlan()
    request = ResponsesRequest(input="x", tools=[WEATHER] if tools else None)
    return Answer(request, "resp_1", "demo", SamplingParams(), plan)


def chunk(text: str) -> CompletionChunk:
    return CompletionChunk(index=0, text=text, token_ids=(1,), logprobs=None, finish_reason=None, stop_reason=None)


def read_by_client(events: list[dict[str, Any]]) -> Response:
    """What the client's own reader makes of events, each of which must be of a known shape."""
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    state: ResponseStreamState[Any] = ResponseStreamState(input_tools=[], text_format=openai.omit)
    items: dict[int, Any] = {}
    for event in events:
        parsed = EVENT.validate_python(event)
        assert parsed.type == event["type"]
        state.handle_event(parsed)
        if parsed.type == "response.output_item.done":
            items[parsed.output_index] = parsed.item
    assert [item.model_dump() for item in items.values()] == [item.model_dump() for item in parsed.response.output], (
        "what was streamed is what the response holds"
    )
    return parsed.response


@pytest.mark.parametrize("size", [1, 3, 1000])
@pytest.mark.parametrize(("text", "expected"), list(TEXTS.values()), ids=list(TEXTS))
def test_streamed_items_are_what_the_client_reads(text: str, expected: list[Any], size: int) -> None:
    answer = scripted()
    events = list(answer.begin())
    for start in range(0, len(text), size):
        events += answer.add(chunk(text[start : start + size]))
    usage = usage_object(3, 5, 0)
    output = CompletionOutput(index=0, text=text, finish_reason="stop")
    events += answer.finish(output, usage)
    whole = Response.model_validate(scripted().whole(output, usage))
    for response in (read_by_client(events), whole):
        assert [facts(item) for item in response.output] == expected
        assert {item.status for item in response.output} == {response.status} == {"completed"}


def facts(item: Any) -> Any:
    if item.type == "message":
        return "".join(part.text for part in item.content)
    assert item.call_id.startswith("call_")
    return item.name, item.arguments


def test_a_lost_engine_fails_a_response_that_has_begun() -> None:
    answer = scripted(tools=False)
    events = [*answer.begin(), *answer.add(chunk("Hel")), *answer.fail(ServerError("a rank was lost"))]
    response = read_by_client(events)
    assert events[-1]["type"] == "response.failed"
    assert response.status == "failed"
    assert (response.error.code, response.error.message) == ("server_error", "a rank was lost")
    assert response.output[0].status == "incomplete"
    assert response.output_text == "Hel"
