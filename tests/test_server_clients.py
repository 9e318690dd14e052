"""Clients that leave, are slow, are many, or send what they should not: nobody else notices."""

import http.client
import json
import socket
import struct
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import openai
import pytest

from headrace.engine.engine import Engine
from headrace.engine.outputs import RequestUpdate
from headrace.server import http_protocol, recorder
from tests.serving import RunningServer, engine_settings, raw_request, running_server

pytest_plugins = ["tests.server_fixtures"]

LONG = {"prompt": "Once upon a time", "max_tokens": 900, "ignore_eos": True, "temperature": 1.0}
HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: test\r\nContent-Type: application/json\r\n"


@pytest.fixture(scope="module")
def server() -> Iterator[RunningServer]:
    with running_server(
        engine_settings(scheduler={"max_num_seqs": 4}),
        max_waiting_requests=2,
        max_waiting_tokens=2000,
        max_logprob_bytes=11 * 2**20,
        max_body_bytes=100_000,
        max_bodies_bytes=250_000,
        body_timeout_s=0.5,
        slow_reader_s=1.0,
        cors_origins=("https://a.example",),
    ) as running:
        yield running


@pytest.fixture(autouse=True)
def nothing_stays_behind(server: RunningServer) -> Iterator[None]:
    yield
    server.assert_nothing_stays_behind()


def _is_idle(engine: Engine) -> bool:
    return not engine.has_unfinished


def _num_running(engine: Engine) -> int:
    return engine.metrics().num_running


def _answer(connection: socket.socket) -> tuple[int, dict[str, str], bytes]:
    response = http.client.HTTPResponse(connection)
    response.begin()
    return response.status, {k.lower(): v for k, v in response.getheaders()}, response.read()


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("is_abrupt", [True, False])
def test_a_client_that_leaves_ends_its_request(server: RunningServer, stream: bool, is_abrupt: bool) -> None:
    before = server.ask(lambda engine: engine.metrics().num_decode_tokens)
    with server.connect() as connection:
        connection.sendall(raw_request({**LONG, "stream": stream, "n": 2}))
        server.wait_for(lambda engine: engine.metrics().num_decode_tokens > before + 4)
        if is_abrupt:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    server.wait_for(_is_idle)
    assert server.ask(lambda engine: engine.metrics().num_decode_tokens) < before + 1700


def test_a_client_that_leaves_before_its_turn_ends_its_request(server: RunningServer) -> None:
    admission = server.serving.engine.admission
    before = server.ask(lambda engine: engine.metrics().num_steps)
    with server.paused():
        with server.connect() as connection:
            connection.sendall(raw_request({**LONG, "stream": True}))
            server.wait_until(lambda: admission.num_requests == 1)
        server.wait_until(lambda: admission.num_requests == 0)
    assert server.ask(lambda engine: engine.metrics().num_steps) == before


def test_a_slow_reader_holds_nobody_and_ends(server: RunningServer, client: openai.OpenAI) -> None:
    with socket.socket() as slow:
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        slow.settimeout(20)
        slow.connect(server.address)
        slow.sendall(raw_request({**LONG, "stream": True, "logprobs": 20, "n": 3}))
        server.wait_for(lambda engine: _num_running(engine) == 3)
        answer = client.completions.create(model="demo", prompt="The", max_tokens=5)
        assert answer.usage.completion_tokens > 0
        server.wait_for(_is_idle)
        open_before = server.serving.engine.num_open
        deadline_s = time.monotonic() + 20
        while server.serving.http.server_state.tasks and time.monotonic() < deadline_s:
            time.sleep(0.05)
        assert not server.serving.http.server_state.tasks, "somebody still waits for the slow reader"
        assert open_before == 0


def test_what_waits_is_limited_and_told_when_to_come_again(server: RunningServer, client: openai.OpenAI) -> None:
    with server.paused(), server.connect() as connection:
        connection.sendall(raw_request({"prompt": "Hello", "n": 2, "max_tokens": 3}))
        server.wait_until(lambda: server.serving.engine.admission.num_requests == 2)
        with pytest.raises(openai.RateLimitError) as refused:
            client.completions.create(model="demo", prompt="Hello")
    assert refused.value.code == "queue_full"
    assert int(refused.value.response.headers["retry-after"]) >= 1
    assert client.completions.create(model="demo", prompt="Hello", max_tokens=3).choices


def test_tokens_that_wait_are_limited_too(server: RunningServer, client: openai.OpenAI) -> None:
    with server.paused(), server.connect() as connection:
        connection.sendall(raw_request({"prompt": [7] * 1000, "max_tokens": 5}))
        server.wait_until(lambda: server.serving.engine.admission.num_tokens == 1000)
        with pytest.raises(openai.RateLimitError, match="prompt tokens wait"):
            client.completions.create(model="demo", prompt=[8] * 1001, max_tokens=5)


def test_log_probabilities_of_all_open_requests_are_limited(server: RunningServer, client: openai.OpenAI) -> None:
    """4214 bytes for each of 1800 positions are 7.2 MiB; 950 others are 3.8 MiB."""
    admission = server.serving.engine.admission
    body = {"prompt": [7] * 100, "max_tokens": 850, "n": 2, "logprobs": 20, "prompt_logprobs": 20}
    ask = partial(client.completions.create, model="demo", prompt="Hello", max_tokens=950, logprobs=20, stop=["e"])
    with server.paused(), server.connect() as connection:
        connection.sendall(raw_request(body))
        server.wait_until(lambda: admission.logprob_bytes == 1800 * 4214)
        with pytest.raises(openai.RateLimitError, match="open requests may take 8 MiB") as refused:
            ask()
        connection.close()
        server.wait_until(lambda: admission.logprob_bytes == 0)
    assert int(refused.value.response.headers["retry-after"]) >= 1
    assert ask().choices
    assert admission.num_refused["max_logprob_bytes"] == 1


def test_one_request_for_too_many_log_probabilities_is_refused_for_good(client: openai.OpenAI) -> None:
    """4 outputs of 900 tokens, 4214 bytes for each: 14.5 MiB."""
    with pytest.raises(openai.BadRequestError, match=r"15 MiB.*at most 11 MiB") as refused:
        client.completions.create(model="demo", prompt="Hello", max_tokens=900, n=4, logprobs=20)
    assert refused.value.param == "logprobs"


def test_of_several_prompts_all_are_accepted_or_none(server: RunningServer, client: openai.OpenAI) -> None:
    finished = server.ask(lambda engine: engine.metrics().num_finished_requests)
    with pytest.raises(openai.BadRequestError):
        client.completions.create(model="demo", prompt=["Hello", "x" * 20_000])
    assert server.ask(lambda engine: engine.metrics().num_finished_requests) == finished


@pytest.mark.parametrize("is_announced", [True, False])
def test_a_body_that_is_too_large_is_refused(server: RunningServer, is_announced: bool) -> None:
    body = json.dumps({"prompt": "x" * 200_000}).encode()
    with server.connect() as connection:
        if is_announced:
            connection.sendall(HEAD + b"Content-Length: %d\r\n\r\n" % len(body))
        else:
            connection.sendall(HEAD + b"Transfer-Encoding: chunked\r\n\r\n%x\r\n" % len(body) + body)
        status, _, answer = _answer(connection)
    assert status == 413
    assert json.loads(answer)["error"]["code"] == "body_too_large"


def test_a_body_that_does_not_arrive_is_not_waited_for(server: RunningServer) -> None:
    with server.connect() as connection:
        connection.sendall(raw_request({"prompt": "Hello"})[:-3])
        status, headers, answer = _answer(connection)
    assert (status, headers["connection"]) == (408, "close")
    assert json.loads(answer)["error"]["code"] == "body_timeout"


def _padded(body: dict[str, object], num_bytes: int) -> bytes:
    """A request whose body has so many bytes."""
    data = json.dumps(body).encode()
    return HEAD + b"Content-Length: %d\r\n\r\n" % num_bytes + data + b" " * (num_bytes - len(data))


def test_bodies_of_all_open_requests_are_limited_together(server: RunningServer) -> None:
    """Two of three fit in. The third one does when one of them has ended: here, as its client has left."""
    admission = server.serving.engine.admission
    asked = _padded({"prompt": "Hello", "max_tokens": 3}, 100_000)
    with server.connect() as first, server.connect() as second, server.connect() as third, server.connect() as fourth:
        with server.paused():
            first.sendall(asked)
            second.sendall(asked)
            server.wait_until(lambda: admission.body_bytes == 200_000)
            third.sendall(asked)
            status, headers, answer = _answer(third)
            first.close()
            server.wait_until(lambda: admission.body_bytes == 100_000)
            fourth.sendall(asked)
            server.wait_until(lambda: admission.body_bytes == 200_000)
        assert _answer(second)[0] == _answer(fourth)[0] == 200
    assert (status, headers["connection"], int(headers["retry-after"]) >= 1) == (503, "close", True)
    error = json.loads(answer)["error"]
    assert (error["type"], error["code"]) == ("service_unavailable_error", "too_many_bodies")
    assert admission.num_refused["max_bodies_bytes"] == 1


def test_a_body_of_which_only_the_beginning_came_is_given_up(server: RunningServer) -> None:
    admission = server.serving.engine.admission
    with server.connect() as connection:
        connection.sendall(_padded({"prompt": "Hello"}, 90_000)[:60_000])
        server.wait_until(lambda: admission.body_bytes > 50_000)
    server.wait_until(lambda: admission.body_bytes == 0, timeout_s=5)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'"text"',
        b'{"prompt": "x", "temperature": NaN}',
        b'{"prompt": "x", "temperature": 1e999}',
        b'{"prompt": "\\ud800"}',
        b'{"prompt": "x", "seed": 123456789012345678901234567890}',
        b'{"prompt": [1, -1]}',
        b'{"prompt": [1, 99999]}',
        b'{"prompt": [1, true]}',
        b'{"prompt": [[]]}',
        b'{"prompt": []}',
        b'{"prompt": "x", "logit_bias": {"99999": 1}}',
        b'{"prompt": "x", "stop": [""]}',
        b'{"prompt": "x", "min_tokens": 20, "max_tokens": 10}',
        b'{"prompt": "x", "n": 129}',
        b"[" * 50_000,
        b'{"a":' * 20_000,
        b"\xff\xfe\x00",
    ],
    ids=lambda body: repr(body[:40]),
)
def test_a_body_that_makes_no_sense_is_the_clients_fault(server: RunningServer, body: bytes) -> None:
    with server.connect() as connection:
        connection.sendall(HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        status, _, answer = _answer(connection)
    assert (status, json.loads(answer)["error"]["type"]) == (400, "invalid_request_error"), answer


def test_a_body_that_is_not_declared_as_json_is_told_so(server: RunningServer) -> None:
    body = b'{"prompt": "Hello"}'
    with server.connect() as connection:
        head = HEAD.replace(b"application/json", b"text/plain")
        connection.sendall(head + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        status, _, answer = _answer(connection)
    assert (status, "Content-Type" in json.loads(answer)["error"]["message"]) == (400, True)


def test_a_connection_that_says_next_to_nothing_is_closed(
    server: RunningServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_protocol, "HEAD_TIMEOUT_S", 0.3)
    with server.connect() as silent, server.connect() as dripping:
        dripping.sendall(b"GET /version HT")
        assert silent.recv(100) == b""
        assert dripping.recv(100) == b""


def test_health_answers_to_head(server: RunningServer) -> None:
    connection = http.client.HTTPConnection(*server.address, timeout=20)
    connection.request("HEAD", "/health")
    response = connection.getresponse()
    assert (response.status, response.read()) == (200, b"")
    connection.close()


def test_many_at_once_get_what_each_gets_alone(server: RunningServer, client: openai.OpenAI) -> None:
    """Seeded requests, four in a step, two waiting, the others told to come again: nobody's text depends on it."""
    prompts = [f"Story {index}: once" for index in range(10)]

    def ask(prompt: str) -> str:
        """Comes again far sooner than it is told to."""
        deadline_s = time.monotonic() + 20
        while True:
            try:
                answer = client.completions.create(model="demo", prompt=prompt, seed=3, temperature=1.0, max_tokens=20)
                return answer.choices[0].text
            except openai.RateLimitError:
                assert time.monotonic() < deadline_s
                time.sleep(0.01)

    num_refused = server.serving.engine.admission.num_refused
    before = num_refused["max_waiting_requests"]
    with ThreadPoolExecutor(len(prompts)) as threads:
        with server.paused():
            texts = [threads.submit(ask, prompt) for prompt in prompts]
            server.wait_until(lambda: num_refused["max_waiting_requests"] >= before + len(prompts) - 2)
        assert [text.result() for text in texts] == [ask(prompt) for prompt in prompts]


def test_other_origins_may_ask_only_if_they_are_listed(server: RunningServer) -> None:
    for origin, is_allowed in (("https://a.example", True), ("https://b.example", False)):
        with server.connect() as connection:
            connection.sendall(f"GET /version HTTP/1.1\r\nHost: t\r\nOrigin: {origin}\r\n\r\n".encode())
            _, headers, _ = _answer(connection)
        assert (headers.get("access-control-allow-origin") == origin) is is_allowed


def _streamed_text(connection: socket.socket) -> str:
    events = _answer(connection)[2].decode().split("\n\n")
    return "".join([json.loads(data[6:])["choices"][0]["text"] for data in events if data.startswith("data: {")])


def test_an_id_used_again_gets_nothing_of_the_request_that_had_it_first(
    server: RunningServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even from a step that ran for the first one when its client left, and comes back after the second began."""
    monkeypatch.setattr(recorder, "_GRACE_S", 0.0)
    is_held, may_go_on = threading.Event(), threading.Event()
    body = {"prompt": "The sea", "max_tokens": 4, "temperature": 0, "stream": True}
    asked = raw_request(body, headers="X-Request-Id: same\r\n")
    with server.connect() as connection:
        connection.sendall(asked)
        alone = _streamed_text(connection)

    def hold_next_step(engine: Engine) -> None:
        step = engine.step

        def held_step() -> list[RequestUpdate]:
            del engine.step  # type: ignore[method-assign]
            updates = step()
            is_held.set()
            may_go_on.wait(20)
            return updates

        engine.step = held_step  # type: ignore[method-assign]

    open_records = server.serving._observability.recorder._open
    server.ask(hold_next_step)
    with server.connect() as first:
        first.sendall(raw_request(LONG, headers="X-Request-Id: same\r\n"))
        assert is_held.wait(20)
    server.wait_until(lambda: "same" not in open_records)
    with server.connect() as second:
        second.sendall(asked)
        server.wait_until(lambda: server.serving.engine.num_open == 1)
        may_go_on.set()
        assert _streamed_text(second) == alone


def test_a_request_has_no_more_time_than_it_is_given(server: RunningServer) -> None:
    """Though it might wait longer for its first token."""
    body = {**LONG, "max_tokens": 1000, "n": 4}
    with running_server(request_timeout_s=0.1) as hasty, hasty.connect() as connection, hasty.paused():
        connection.sendall(raw_request(body))
        status, _, answer = _answer(connection)
    assert status == 504
    assert json.loads(answer)["error"]["code"] == "timeout"


@pytest.mark.parametrize("begin", [b"GET /version?", b"GET /version HTTP/1.1\r\nX-Long: "])
def test_a_head_that_does_not_end_is_not_kept(server: RunningServer, begin: bytes) -> None:
    with server.connect() as connection:
        connection.sendall(b"GET /version HTTP/1.1\r\nHost: test\r\n\r\n")
        assert _answer(connection)[0] == 200
        connection.sendall(begin)
        for _ in range(66):
            connection.sendall(b"a" * 1000)
        status, _, body = _answer(connection)
        assert (status, json.loads(body)["error"]["code"]) == (431, "head_too_large")
        assert connection.recv(1) == b""


def test_many_requests_in_a_row_are_no_long_head(server: RunningServer) -> None:
    asked = b"GET /version HTTP/1.1\r\nHost: test\r\nX-Long: " + b"a" * 30_000 + b"\r\n\r\n"
    with server.connect() as connection:
        connection.sendall(asked * 8)
        received = b""
        while received.count(b"HTTP/1.1 200") < 8:
            data = connection.recv(65536)
            assert data
            received += data


def test_a_client_that_has_asked_twice_and_leaves_ends_both_requests(server: RunningServer) -> None:
    """Though the second one is what the connection is about by then."""
    with server.connect() as connection, server.paused():
        connection.sendall(raw_request(LONG) * 2)
        server.wait_until(lambda: server.serving.engine.num_open == 1)
        connection.close()
        server.wait_until(lambda: server.serving.engine.num_open == 0, timeout_s=5)
