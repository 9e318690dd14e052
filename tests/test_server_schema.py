"""Requests made from the OpenAPI document, right and wrong ones, and bodies of no sense: never a 5xx, never a hang."""

import http.client
import json
from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from schemathesis.generation import GenerationMode

from tests.serving import RunningServer, engine_settings, running_server

OPERATIONS = (
    ("GET", "/health"),
    ("GET", "/metrics"),
    ("GET", "/stats"),
    ("GET", "/v1/models"),
    ("GET", "/v1/models/{name}"),
    ("GET", "/version"),
    ("POST", "/detokenize"),
    ("POST", "/tokenize"),
    ("POST", "/v1/chat/completions"),
    ("POST", "/v1/completions"),
    ("POST", "/v1/embeddings"),
    ("POST", "/v1/responses"),
)
NUM_EXAMPLES = 8

quick = settings(
    max_examples=NUM_EXAMPLES,
    deadline=None,
    derandomize=True,
    database=None,
    phases=(Phase.explicit, Phase.generate),
    suppress_health_check=list(HealthCheck),
)


@pytest.fixture(scope="module")
def server() -> Iterator[RunningServer]:
    """Texts are short, so that a request for a hundred outputs of any length is over soon."""
    with running_server(engine_settings(scheduler={"max_model_len": 48}), request_timeout_s=20) as running:
        yield running


@pytest.fixture(scope="module")
def schema(server: RunningServer) -> Any:
    return schemathesis.openapi.from_url(f"{server.url}/openapi.json")


def test_the_document_lists_every_operation(schema: Any) -> None:
    found = sorted((o.ok().method.upper(), o.ok().path) for o in schema.get_all_operations())
    assert found == sorted(OPERATIONS)


@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE], ids=lambda mode: mode.value)
@pytest.mark.parametrize(("method", "path"), OPERATIONS)
def test_requests_made_from_the_document_never_break_the_server(
    schema: Any, server: RunningServer, method: str, path: str, mode: GenerationMode
) -> None:
    operation = schema[path][method]
    if mode is GenerationMode.NEGATIVE and operation.body is not None and not len(operation.body):
        pytest.skip("nothing that could be wrong is sent")

    @quick
    @given(case=operation.as_strategy(generation_mode=mode))
    def check(case: Any) -> None:
        response = case.call(base_url=server.url, timeout=30)
        assert response.status_code < 500, response.text
        declared = {str(status) for status in operation.definition.raw["responses"]} | {"404", "405"}
        assert str(response.status_code) in declared, response.text
        if response.status_code >= 400:
            error = response.json()["error"]
            assert error["message"]
            assert error["type"]

    check()


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=12), inner, max_size=4),
    max_leaves=12,
)
FIELDS = ("prompt", "messages", "model", "stop", "n", "seed", "logit_bias", "tools", "tool_choice", "response_format")
FIELDS += ("stream", "stream_options", "structured_outputs", "logprobs", "top_logprobs", "input", "text", "echo")
FIELDS += ("max_tokens", "temperature", "chat_template_kwargs", "guided_regex", "guided_json", "guided_grammar")


@pytest.mark.parametrize("path", [path for method, path in OPERATIONS if method == "POST"])
@settings(quick, max_examples=25)
@given(body=st.dictionaries(st.sampled_from(FIELDS), json_values, max_size=6) | json_values)
def test_bodies_of_any_json_never_break_the_server(server: RunningServer, path: str, body: Any) -> None:
    status, answer = _post(server, path, json.dumps(body).encode())
    assert status < 500, (body, answer)


@pytest.mark.parametrize("path", [path for method, path in OPERATIONS if method == "POST"])
@settings(quick, max_examples=12)
@given(body=st.binary(max_size=200), content_type=st.sampled_from(("application/json", "text/plain", "x", "")))
def test_bodies_of_any_bytes_never_break_the_server(
    server: RunningServer, path: str, body: bytes, content_type: str
) -> None:
    status, answer = _post(server, path, body, content_type)
    assert 400 <= status < 500, (body, answer)


def _post(server: RunningServer, path: str, body: bytes, content_type: str = "application/json") -> tuple[int, bytes]:
    connection = http.client.HTTPConnection(*server.address, timeout=30)
    try:
        connection.request("POST", path, body, {"Content-Type": content_type})
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()


header_bytes = st.binary(max_size=60)


@settings(quick, max_examples=40)
@given(name=header_bytes, value=header_bytes, line=st.binary(min_size=1, max_size=60))
def test_heads_of_any_bytes_never_break_the_server(
    server: RunningServer, name: bytes, value: bytes, line: bytes
) -> None:
    with server.connect() as connection:
        connection.settimeout(10)
        connection.sendall(b"GET /version HTTP/1.1\r\nHost: x\r\n" + name + b": " + value + b"\r\n\r\n")
        answer = connection.recv(4096)
    assert b" 500 " not in answer[:20]
    with server.connect() as connection:
        connection.sendall(line)
    assert _get_version(server) == 200


def _get_version(server: RunningServer) -> int:
    connection = http.client.HTTPConnection(*server.address, timeout=30)
    try:
        connection.request("GET", "/version")
        return connection.getresponse().status
    finally:
        connection.close()
