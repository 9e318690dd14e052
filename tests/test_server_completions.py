"""`/v1/completions` and `/v1/chat/completions` through the official client, beside the engine itself."""

import http.client
import json
import re
import threading
import urllib.request

import openai
import pytest
from pydantic import ValidationError

from headrace import LLM, SamplingParams
from headrace.server.encoding import chat_logprobs
from headrace.server.protocol.base import RequestModel
from headrace.server.protocol.chat import ChatCompletionRequest
from headrace.server.protocol.completions import CompletionRequest
from headrace.server.protocol.embeddings import EmbeddingRequest
from headrace.server.protocol.responses import ResponsesRequest
from headrace.server.protocol.text import DetokenizeRequest, TokenizeRequest
from tests.serving import RunningServer

pytest_plugins = ["tests.server_fixtures"]

QUESTION = [{"role": "user", "content": "What is the largest ocean?"}]


def test_a_chat_is_what_the_engine_answers(client: openai.OpenAI, llm: LLM) -> None:
    answer = client.chat.completions.create(model="demo", messages=QUESTION, temperature=0)
    [expected] = llm.chat(QUESTION, SamplingParams(temperature=0, max_tokens=None))
    assert answer.choices[0].message.content == expected.outputs[0].text
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len(expected.prompt_token_ids)
    assert answer.usage.completion_tokens == len(expected.outputs[0].token_ids)


def test_a_stream_is_the_same_answer_in_pieces(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(model="demo", messages=QUESTION, temperature=0)
    with client.chat.completions.create(
        model="demo", messages=QUESTION, temperature=0, stream=True, stream_options={"include_usage": True}
    ) as stream:
        chunks = list(stream)
    assert "".join(c.choices[0].delta.content or "" for c in chunks[:-1]) == whole.choices[0].message.content
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-2].choices[0].finish_reason == "stop"
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert all(chunk.usage is None for chunk in chunks[:-1])


def test_prompts_times_n_are_choices_in_order(client: openai.OpenAI, llm: LLM) -> None:
    prompts = ["Once upon a time", "The"]
    answer = client.completions.create(model="demo", prompt=prompts, n=2, seed=5, max_tokens=6, temperature=1.0)
    expected = llm.generate(prompts, SamplingParams(n=2, seed=5, max_tokens=6, temperature=1.0))
    texts = [output.text for result in expected for output in result.outputs]
    assert [choice.text for choice in answer.choices] == texts
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]


def test_streams_of_several_prompts_are_told_apart_by_their_index(client: openai.OpenAI) -> None:
    prompts = ["Once upon a time", "The"]
    settings = {"model": "demo", "prompt": prompts, "n": 2, "seed": 5, "max_tokens": 6, "temperature": 1.0}
    whole = client.completions.create(**settings)
    texts = [""] * 4
    for chunk in client.completions.create(**settings, stream=True):
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == [choice.text for choice in whole.choices]


def test_logprobs_are_those_of_the_engine(client: openai.OpenAI, llm: LLM) -> None:
    answer = client.chat.completions.create(
        model="demo", messages=QUESTION, temperature=0, max_tokens=4, logprobs=True, top_logprobs=3
    )
    [expected] = llm.chat(QUESTION, SamplingParams(temperature=0, max_tokens=4, logprobs=3))
    content = answer.choices[0].logprobs.content
    for entry, token_id, likely in zip(
        content, expected.outputs[0].token_ids, expected.outputs[0].logprobs, strict=True
    ):
        assert entry.token == likely[token_id].decoded_token
        assert entry.logprob == pytest.approx(likely[token_id].logprob, abs=1e-6)
        by_rank = sorted(likely.values(), key=lambda e: e.rank)[:3]
        assert [top.token for top in entry.top_logprobs] == [e.decoded_token for e in by_rank]


def test_echo_repeats_the_prompt_and_scores_it(client: openai.OpenAI, llm: LLM) -> None:
    answer = client.completions.create(
        model="demo", prompt="The largest", max_tokens=3, temperature=0, echo=True, logprobs=0
    )
    [expected] = llm.generate("The largest", SamplingParams(temperature=0, max_tokens=3, prompt_logprobs=0, logprobs=0))
    choice = answer.choices[0]
    assert choice.text == "The largest" + expected.outputs[0].text
    scored = [row[i].logprob for i, row in zip(expected.prompt_token_ids, expected.prompt_logprobs, strict=True) if row]
    assert choice.logprobs.token_logprobs[1 : 1 + len(scored)] == pytest.approx(scored, abs=1e-6)
    assert "".join(choice.logprobs.tokens) == choice.text
    for offset, token in zip(choice.logprobs.text_offset, choice.logprobs.tokens, strict=True):
        assert choice.text[offset:].startswith(token)


@pytest.mark.parametrize(
    ("settings", "param", "words"),
    [
        ({"temperature": -1}, "temperature", "temperature is -1; it should be greater than or equal to 0"),
        ({"temperature": "hot"}, "temperature", "temperature is 'hot'; it should be a valid number"),
        ({"temperature": True}, "temperature", "temperature is true; it should be a valid number"),
        ({"max_tokens": "5"}, "max_tokens", "max_tokens is '5'; it should be a valid integer"),
        ({"max_tokens": 5.0}, "max_tokens", "max_tokens is 5.0; it should be a valid integer"),
        ({"echo": 1}, "echo", "echo is 1; it should be a valid boolean"),
        ({"extra_body": {"logit_bias": {"5": "1"}}}, "logit_bias.5", "is '1'; it should be a valid number"),
        ({"stream_options": {"include_usage": "yes"}}, "stream_options.include_usage", "is 'yes'; it should be"),
        ({"extra_body": {"best_of": True}}, "best_of", "'best_of' is not supported"),
        ({"max_tokens": -1}, "max_tokens", "max_tokens is -1; it should be greater than or equal to 0"),
        ({"stream": []}, "stream", "stream is a list; it should be a valid boolean"),
        ({"extra_body": {"no_such_field": 1}}, "no_such_field", "no_such_field"),
        ({"extra_body": {"suffix": "x"}}, "suffix", "suffix"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "stream_options"),
        ({"extra_body": {"logit_bias": {"x": 1}}}, "logit_bias", "logit_bias"),
        ({"extra_body": {"logit_bias": {"999999": 1}}}, "logit_bias", "logit_bias names token 999999"),
        ({"prompt": [1, 999999]}, "prompt", "prompt token 999999 is not in the vocabulary"),
        ({"prompt": [5] * 5000}, "prompt", "the prompt has 5000 tokens"),
    ],
)
def test_a_wrong_field_is_named(client: openai.OpenAI, settings: dict, param: str, words: str) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        client.completions.create(**{"model": "demo", "prompt": "Hello", **settings})
    assert refused.value.param == param
    assert words in refused.value.message


@pytest.mark.parametrize(
    ("path", "body", "param", "words"),
    [
        ("/completions", b"", None, "the body is empty; send a JSON object"),
        ("/completions", b"[]", None, "the body is a list; it should be"),
        ("/chat/completions", b"{}", "messages", "messages is missing; send it"),
        ("/chat/completions", b'{"messages": [{"role": "usr", "content": "x"}]}', "messages", "the role 'usr'"),
        ("/chat/completions", b'{"messages": [{"role": 5}]}', "messages.0.role", "messages.0.role is 5; it should be"),
        ("/responses", b'{"input": [{"role": "user", "content": "' + b"x " * 2000 + b'"}]}', "input", "the prompt has"),
    ],
)
def test_a_wrong_body_is_explained(
    client: openai.OpenAI, path: str, body: bytes, param: str | None, words: str
) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        client.post(path, content=body, cast_to=object, options={"headers": {"Content-Type": "application/json"}})
    assert refused.value.param == param
    assert words in refused.value.message


def test_a_whole_number_will_do_where_any_number_is_meant(client: openai.OpenAI) -> None:
    sent = {"temperature": 1, "top_p": 1, "extra_body": {"logit_bias": {"5": 1}, "length_penalty": 1, "best_of": 1}}
    assert client.completions.create(model="demo", prompt="Hello", max_tokens=1, **sent).usage


def test_a_field_of_several_types_is_explained_once(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        client.completions.create(model="demo", prompt=[1, "two"])
    assert refused.value.param == "prompt"
    assert refused.value.message.endswith("prompt should be a valid string, or a valid integer, or a valid list")


def test_more_tokens_than_there_is_room_for_are_refused_not_cut(client: openai.OpenAI) -> None:
    for create, prompt, name in (
        (client.completions.create, {"prompt": "Hello"}, "max_tokens"),
        (client.chat.completions.create, {"messages": QUESTION}, "max_completion_tokens"),
        (client.responses.create, {"input": "Hello"}, "max_output_tokens"),
    ):
        with pytest.raises(openai.BadRequestError) as refused:
            create(model="demo", **prompt, **{name: 1024})
        assert (refused.value.param, refused.value.code) == (name, "context_length_exceeded")


def test_a_prompt_can_be_scored_without_an_output(client: openai.OpenAI) -> None:
    settings = {"model": "demo", "prompt": "The largest ocean", "echo": True, "logprobs": 1}
    scored = client.completions.create(**settings, max_tokens=0)
    longer = client.completions.create(**settings, max_tokens=2)
    assert (scored.choices[0].text, scored.usage.completion_tokens) == ("The largest ocean", 0)
    num_tokens = scored.usage.prompt_tokens
    assert scored.choices[0].logprobs.tokens == longer.choices[0].logprobs.tokens[:num_tokens]
    assert scored.choices[0].logprobs.token_logprobs == longer.choices[0].logprobs.token_logprobs[:num_tokens]
    with pytest.raises(openai.BadRequestError, match="echo"):
        client.completions.create(model="demo", prompt="Hello", max_tokens=0)


def test_what_asks_for_nothing_may_be_sent(client: openai.OpenAI) -> None:
    nothing = {"best_of": 1, "use_beam_search": False, "length_penalty": 1.0, "echo": False, "top_k": None}
    assert client.chat.completions.create(model="demo", messages=QUESTION, max_tokens=2, extra_body=nothing).choices
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(model="demo", messages=QUESTION, extra_body={"use_beam_search": True})
    assert refused.value.param == "use_beam_search"


def test_another_model_is_not_found(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as refused:
        client.completions.create(model="gpt-5", prompt="Hello")
    assert refused.value.code == "model_not_found"
    assert [model.id for model in client.models.list()] == ["demo"]


def test_a_prompt_that_never_fits_is_refused_alone(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        client.completions.create(model="demo", prompt=[5] * 5000)
    assert refused.value.code == "context_length_exceeded"


@pytest.mark.parametrize(
    ("method", "path", "headers", "status", "words"),
    [
        ("POST", "/v1/completions", {}, 400, "Content-Type is ''; .*application/json"),
        ("POST", "/v1/completions", {"Content-Type": "application/x-www-form-urlencoded"}, 400, "www-form.*json"),
        ("POST", "/v1/completions", {"Content-Type": "application/json; charset=utf-8"}, 200, "text_completion"),
        ("POST", "/chat/completions", {}, 404, "no POST /chat/completions here; did you mean /v1/chat/completions"),
        ("POST", "/v1/chat/completion", {}, 404, "did you mean /v1/chat/completions"),
        ("POST", "/v1/moderations", {}, 404, "here; GET /openapi.json lists what there is"),
        ("GET", "/v1/completions", {}, 405, "/v1/completions takes POST, not GET"),
    ],
)
def test_what_curl_is_told(
    server: RunningServer, method: str, path: str, headers: dict, status: int, words: str
) -> None:
    connection = http.client.HTTPConnection(*server.address, timeout=20)
    for _ in range(2):  # On the same connection, which a body that nobody read would spoil.
        connection.request(method, path, b'{"prompt": "Hello", "max_tokens": 1}', headers)
        answer = connection.getresponse()
        assert answer.status == status
        assert re.search(words, answer.read().decode())
    connection.close()


def test_a_token_that_does_not_exist_has_no_text(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="token 2048 is not in the vocabulary") as refused:
        client.post("../detokenize", body={"tokens": [2047, 2048]}, cast_to=object)
    assert refused.value.param == "tokens"
    assert client.post("../detokenize", body={"tokens": [2047]}, cast_to=object)["prompt"]


@pytest.mark.parametrize(
    ("schema", "body"),
    [
        (CompletionRequest, {"prompt": [None] * 1000}),
        (CompletionRequest, {"prompt": [[None] * 1000] * 1000}),
        (CompletionRequest, {"prompt": "a"} | {f"x{index}": None for index in range(1000)}),
        (CompletionRequest, {"prompt": "a", "stop": [0] * 1000}),
        (CompletionRequest, {"prompt": "a", "guided_choice": [0] * 1000}),
        (CompletionRequest, {"prompt": "a", "logit_bias": dict.fromkeys(map(str, range(9000)), "x")}),
        (ChatCompletionRequest, {"messages": [0] * 1000}),
        (ChatCompletionRequest, {"messages": [{"role": "user", "content": [0] * 1000}] * 1000}),
        (ChatCompletionRequest, {"messages": [{"role": "user"}], "tools": [0] * 1000}),
        (ChatCompletionRequest, {"messages": [{"role": "user"}], "metadata": dict.fromkeys(map(str, range(9000)), 0)}),
        (EmbeddingRequest, {"input": [None] * 1000}),
        (ResponsesRequest, {"input": [0] * 1000}),
        (TokenizeRequest, {"messages": [0] * 1000}),
        (DetokenizeRequest, {"tokens": [None] * 1000}),
    ],
)
def test_a_body_full_of_faults_is_refused_for_the_first(schema: type[RequestModel], body: dict) -> None:
    """An error takes a thousand times the memory of what it is about."""
    with pytest.raises(ValidationError) as refused:
        schema.model_validate(body)
    assert refused.value.error_count() < 10


def test_a_stop_string_may_be_longer_than_a_list_of_them() -> None:
    assert CompletionRequest(prompt="a", stop="x" * 1000).stop == "x" * 1000


@pytest.mark.parametrize(
    ("path", "body", "method"),
    [
        ("/tokenize", {"prompt": "Hi", "return_token_strs": True}, "id_to_token"),
        ("/detokenize", {"tokens": [5]}, "decode"),
    ],
)
def test_text_is_made_where_the_loop_does_not_wait(
    server: RunningServer, monkeypatch: pytest.MonkeyPatch, path: str, body: dict, method: str
) -> None:
    tokenizer = server.serving.context.model.tokenizer
    original, threads = getattr(tokenizer, method), set()

    def watched(*args: object, **options: object) -> object:
        threads.add(threading.current_thread().name.rpartition("_")[0])
        return original(*args, **options)

    monkeypatch.setattr(tokenizer, method, watched)
    asked = urllib.request.Request(
        f"{server.url}{path}", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(asked, timeout=20) as answer:
        found = json.loads(answer.read())
    assert threads == {"headrace-text"}
    assert set(found) == ({"prompt"} if method == "decode" else {"count", "max_model_len", "tokens", "token_strs"})


def test_what_one_request_may_ask_for_is_limited(client: openai.OpenAI) -> None:
    """Prompts and n each have a limit, but their product is what has to be held."""
    with pytest.raises(openai.BadRequestError, match="1152 outputs; at most 1024") as refused:
        client.completions.create(model="demo", prompt=["a"] * 9, n=128, max_tokens=1)
    assert refused.value.param == "n"


def test_log_probabilities_are_encoded_where_the_loop_does_not_wait(
    server: RunningServer, client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads = []

    def watched(*given: object) -> object:
        threads.append(threading.current_thread().name.rpartition("_")[0])
        return chat_logprobs(*given)

    monkeypatch.setattr("headrace.server.routes.chat.chat_logprobs", watched)
    client.chat.completions.create(model="demo", messages=QUESTION, max_tokens=2, logprobs=True)
    assert threads == ["headrace-text"]
