"""Outputs of a form, as clients ask for it: what comes always parses; what cannot be compiled is refused at once."""

import json
import re
import threading
from typing import Any

import openai
import pytest

pytest_plugins = ["tests.server_fixtures"]

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 3},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
FORMAT = {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA, "strict": True}}
QUESTION = [{"role": "user", "content": "Who?"}]


def _chat(client: openai.OpenAI, **settings: Any) -> Any:
    settings = {"model": "demo", "messages": QUESTION, "max_completion_tokens": 400, **settings}
    return client.chat.completions.create(**settings)


def _check_person(text: str) -> None:
    person = json.loads(text)
    assert set(person) == {"name", "age", "tags"}
    assert isinstance(person["name"], str)
    assert len(person["name"]) <= 12
    assert isinstance(person["age"], int)
    assert 0 <= person["age"] <= 150
    assert len(person["tags"]) <= 3
    assert set(person["tags"]) <= {"a", "b"}


@pytest.mark.parametrize("temperature", [0.0, 1.0, 5.0])
def test_a_schema_is_followed_whatever_the_model_would_rather_say(client: openai.OpenAI, temperature: float) -> None:
    answer = _chat(client, response_format=FORMAT, temperature=temperature, n=4, seed=7)
    for choice in answer.choices:
        assert choice.finish_reason == "stop"
        _check_person(choice.message.content)


def test_a_stream_follows_it_too_and_so_does_a_crowd(client: openai.OpenAI) -> None:
    """Beside requests that have no form, or another one."""
    texts: dict[int, str] = {}

    def ask(index: int) -> None:
        if index % 3 == 0:
            texts[index] = (
                _chat(client, temperature=1.0, seed=index, max_completion_tokens=30).choices[0].message.content
            )
            return
        settings = (
            {"response_format": FORMAT} if index % 3 == 1 else {"extra_body": {"guided_regex": "[0-9]{3}-[a-f]{2}"}}
        )
        stream = _chat(client, temperature=1.0, seed=index, stream=True, **settings)
        texts[index] = "".join(chunk.choices[0].delta.content or "" for chunk in stream)

    threads = [threading.Thread(target=ask, args=(index,)) for index in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index, text in texts.items():
        if index % 3 == 1:
            _check_person(text)
        elif index % 3 == 2:
            assert re.fullmatch("[0-9]{3}-[a-f]{2}", text)
    alone = _chat(client, response_format=FORMAT, temperature=1.0, seed=4).choices[0].message.content
    assert alone == texts[4]


@pytest.mark.parametrize(
    "form",
    [
        {"response_format": {"type": "json_object"}},
        {"response_format": {"type": "json_schema", "json_schema": {"name": "any"}}},
        {"extra_body": {"guided_json": SCHEMA}},
        {"extra_body": {"structured_outputs": {"json": json.dumps(SCHEMA)}}},
    ],
    ids=json.dumps,
)
def test_every_way_to_ask_for_json_gives_json(client: openai.OpenAI, form: dict[str, Any]) -> None:
    choice = _chat(client, temperature=0.5, seed=1, max_completion_tokens=900, **form).choices[0]
    if choice.finish_reason == "stop":
        json.loads(choice.message.content)


@pytest.mark.parametrize(
    "extra",
    [
        {"guided_choice": ["red", "green"]},
        {"structured_outputs": {"choice": ["red", "green"]}},
        {"guided_grammar": 'start: "red" | "green"'},
        {"structured_outputs": {"regex": "red|green"}},
    ],
    ids=json.dumps,
)
def test_every_way_to_ask_for_a_choice_gives_one(client: openai.OpenAI, extra: dict[str, Any]) -> None:
    assert _chat(client, temperature=1.0, extra_body=extra).choices[0].message.content in ("red", "green")


@pytest.mark.parametrize(
    ("settings", "param"),
    [
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        ({"response_format": {"type": "json_object"}, "extra_body": {"guided_regex": "a"}}, "guided_regex"),
        ({"extra_body": {"guided_regex": "("}}, "guided_regex"),
        ({"extra_body": {"guided_grammar": "nonsense"}}, "guided_grammar"),
        ({"extra_body": {"guided_json": {"type": "no such type"}}}, "guided_json"),
        ({"extra_body": {"guided_json": {"$ref": "http://example.com/schema"}}}, "guided_json"),
        ({"extra_body": {"guided_choice": []}}, "guided_choice"),
    ],
    ids=json.dumps,
)
def test_a_form_that_cannot_be_followed_is_refused(client: openai.OpenAI, settings: dict[str, Any], param: str) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        _chat(client, **settings)
    assert refused.value.param == param
