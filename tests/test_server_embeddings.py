"""`/v1/embeddings` through the official client, beside the engine itself."""

import base64
import threading
from collections.abc import Iterator

import numpy as np
import openai
import pytest

from headrace import LLM, PoolingParams
from tests.serving import RunningServer, engine_settings, running_server

pytest_plugins = ["tests.server_fixtures"]

TEXTS = ["What is the largest ocean?", "Once upon a time", "x"]
IDS = [[5, 6, 7], [8], list(range(20, 90))]


@pytest.fixture(scope="module")
def server() -> Iterator[RunningServer]:
    with running_server(engine_settings(scheduler={"max_num_seqs": 4}), max_waiting_requests=3) as running:
        yield running


@pytest.fixture(autouse=True)
def nothing_stays_behind(server: RunningServer) -> Iterator[None]:
    yield
    server.assert_nothing_stays_behind()


def as_prompt(given):
    return given if isinstance(given, str) else {"prompt_token_ids": given}


@pytest.mark.parametrize(
    ("given", "prompts"),
    [(TEXTS[0], TEXTS[:1]), (TEXTS, TEXTS), (IDS[0], IDS[:1]), (IDS, IDS)],
    ids=["text", "texts", "ids", "lists_of_ids"],
)
@pytest.mark.parametrize("encoding_format", ["float", "base64", None])
def test_vectors_are_those_of_the_engine(client: openai.OpenAI, llm: LLM, given, prompts, encoding_format) -> None:
    """The client asks for base64 unless told otherwise, and decodes it."""
    chosen = {} if encoding_format is None else {"encoding_format": encoding_format}
    answer = client.embeddings.create(model="demo", input=given, user="someone", **chosen)
    expected = llm.embed([as_prompt(prompt) for prompt in prompts])
    assert (answer.object, answer.model) == ("list", "demo")
    assert [(entry.index, entry.object) for entry in answer.data] == [(i, "embedding") for i in range(len(prompts))]
    for entry, output in zip(answer.data, expected, strict=True):
        values = entry.embedding
        if isinstance(values, str):
            values = np.frombuffer(base64.b64decode(values), dtype="<f4")
        assert np.asarray(values, dtype=np.float32).tobytes() == output.embedding.tobytes()
    num_tokens = sum(len(output.prompt_token_ids) for output in expected)
    assert (answer.usage.prompt_tokens, answer.usage.total_tokens) == (num_tokens, num_tokens)


@pytest.mark.parametrize(
    ("fields", "params"),
    [
        ({"pooling": "mean"}, PoolingParams(pooling="mean")),
        ({"normalize": False}, PoolingParams(normalize=False)),
        ({"pooling": "last", "normalize": None}, PoolingParams()),
    ],
)
def test_how_they_are_pooled(client: openai.OpenAI, llm: LLM, fields, params) -> None:
    answer = client.embeddings.create(model="demo", input=IDS, extra_body=fields)
    for entry, output in zip(answer.data, llm.embed([as_prompt(ids) for ids in IDS], params), strict=True):
        assert np.asarray(entry.embedding, dtype=np.float32).tobytes() == output.embedding.tobytes()


def test_a_prompt_is_cut_where_that_is_asked_for(client: openai.OpenAI) -> None:
    [cut, same] = [
        client.embeddings.create(model="demo", input=ids, extra_body=extra).data[0].embedding
        for ids, extra in ((IDS[2], {"truncate_prompt_tokens": 3}), (IDS[2][-3:], {}))
    ]
    assert cut == same


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"dimensions": 8}, "dimensions", "'dimensions' is not supported by this server; leave it out"),
        ({"input": []}, "input", "input is empty"),
        ({"input": [[1]] * 2049}, "input", "input is a list of 2049; send at most 2048 at once"),
        ({"input": [[1, 2], []]}, "input", "the prompt has 0 tokens"),
        ({"input": [[1, 999999]]}, "input", "prompt token 999999 is not in the vocabulary"),
        ({"input": {"text": "Hello"}}, "input", "input"),
        ({"encoding_format": "int8"}, "encoding_format", "encoding_format"),
        ({"extra_body": {"pooling": "cls"}}, "pooling", "pooling"),
        ({"extra_body": {"temperature": 1}}, "temperature", "temperature"),
    ],
)
def test_what_is_refused(client: openai.OpenAI, fields, param, message) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        client.embeddings.create(**{"model": "demo", "input": "Hello", "encoding_format": "float", **fields})
    assert message in refused.value.message
    assert (refused.value.param or "").split(".")[0] == (param or "")


def test_a_prompt_that_never_fits(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        client.embeddings.create(model="demo", input=[IDS[0], [5] * 5000])
    assert refused.value.code == "context_length_exceeded"


def test_another_model(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError):
        client.embeddings.create(model="text-embedding-3-small", input="Hello")


def test_many_at_once_are_one_request_for_the_queue(server: RunningServer, client: openai.OpenAI) -> None:
    """An empty queue of three takes one request of forty inputs, whole; while they wait the next one is refused."""
    with server.paused():
        raw = client.with_options(timeout=30).embeddings
        answers = []
        thread = threading.Thread(
            target=lambda: answers.append(raw.create(model="demo", input=[[5, i] for i in range(40)]))
        )
        thread.start()
        server.wait_until(lambda: server.serving.engine.num_open == 40)
        with pytest.raises(openai.RateLimitError) as refused:
            client.embeddings.create(model="demo", input=IDS)
        assert int(refused.value.response.headers["retry-after"]) >= 1
    thread.join(30)
    assert len(answers[0].data) == 40
