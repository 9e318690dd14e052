"""The access log and request ids: through a real server that asks for keys, and the middleware by itself."""

import argparse
import asyncio
import io
import json
import threading
import time
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace

import openai
import pytest

from headrace.cli.serve import add_arguments, server_config
from headrace.config.observability import LogFormat, ObservabilityConfig
from headrace.engine.metrics import RequestMetrics
from headrace.engine.outputs import CompletionOutput, RequestOutput, RequestUpdate
from headrace.errors import ConfigError
from headrace.server.access_log import AccessLog, key_name
from headrace.server.auth import API_KEY
from headrace.server.line_writer import LineWriter
from headrace.server.recorder import RecordedRequests, Recorder
from headrace.server.request_record import RequestRecord, http_id
from tests.http_get import get
from tests.serving import RunningServer, running_server

KEYS = ("sk-first-secret", "sk-second-secret")
ENDLESS = {"ignore_eos": True}


@pytest.fixture(scope="module")
def log_file(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("log") / "access.jsonl"


@pytest.fixture(scope="module")
def server(log_file) -> Iterator[RunningServer]:
    config = ObservabilityConfig(log_format=LogFormat.JSON, log_file=log_file)
    with running_server(observability=config, api_keys=KEYS) as running:
        yield running


@pytest.fixture(scope="module")
def client(server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEYS[1], max_retries=0) as made:
        yield made


def line_of(log_file: Path, request_id: str) -> dict:
    """The one line of a request; what a client has left is logged a moment later."""
    deadline_s = time.monotonic() + 20
    while time.monotonic() < deadline_s:
        lines = [json.loads(line) for line in log_file.read_text().splitlines()]
        found = [line for line in lines if line["request_id"] == request_id]
        if found:
            [line] = found
            return line
        time.sleep(0.05)
    raise AssertionError(f"no line of {request_id}")


def test_a_line_says_what_a_request_took(client, log_file):
    answer = client.completions.with_raw_response.create(
        model="demo", prompt=[[5, 6, 7], [9]], n=2, max_tokens=4, extra_body=ENDLESS
    )
    request_id = answer.headers["x-request-id"]
    assert answer.parse().id == f"cmpl-{request_id}"
    line = line_of(log_file, request_id)
    assert (line["method"], line["path"], line["status"]) == ("POST", "/v1/completions", 200)
    assert (line["prompt_tokens"], line["completion_tokens"]) == (4, 16)
    assert line["finish_reasons"] == ["length"] * 4
    assert line["disconnected"] is False
    assert 0 < line["queue_s"] < line["ttft_s"] < line["duration_s"]
    assert line["api_key"] == f"sha256:{sha256(KEYS[1].encode()).hexdigest()[:8]}"


def test_a_stream_that_its_client_leaves(client, log_file):
    with client.completions.create(
        model="demo",
        prompt=[5],
        max_tokens=900,
        stream=True,
        extra_body=ENDLESS,
        extra_headers={"X-Request-Id": "left"},
    ) as stream:
        assert next(iter(stream)).id == "cmpl-left"
    line = line_of(log_file, "left")
    assert (line["status"], line["disconnected"], line["finish_reasons"]) == (200, True, ["abort"])
    assert 0 < line["completion_tokens"] < 900


def test_chats_have_their_tokens_too(client, log_file):
    chat = client.chat.completions.create(
        model="demo",
        messages=[{"role": "user", "content": "a question that is nobody's business"}],
        max_tokens=3,
        extra_headers={"X-Request-Id": "a-b:c.d_e"},
    )
    line = line_of(log_file, "a-b:c.d_e")
    assert line["prompt_tokens"] == chat.usage.prompt_tokens
    assert line["completion_tokens"] == chat.usage.completion_tokens
    assert chat.id == "chatcmpl-a-b:c.d_e"


def test_every_kind_of_answer_has_its_tokens(client, log_file):
    embedding = client.embeddings.create(model="demo", input=[[5, 6], [7]], extra_headers={"X-Request-Id": "vectors"})
    line = line_of(log_file, "vectors")
    assert (line["prompt_tokens"], line["completion_tokens"], embedding.usage.prompt_tokens) == (3, 0, 3)
    response = client.responses.create(
        model="demo", input="Hello", max_output_tokens=3, store=False, extra_headers={"X-Request-Id": "response"}
    )
    line = line_of(log_file, "response")
    assert line["prompt_tokens"] == response.usage.input_tokens
    assert line["completion_tokens"] == response.usage.output_tokens > 0


def test_requests_that_are_refused_are_logged_too(server, log_file):
    answer = get(f"{server.url}/v1/models?key=sk-in-a-query", X_Request_Id="no-key", Authorization="Bearer sk-wrong")
    assert (answer.status, answer.headers["x-request-id"]) == (401, "no-key")
    line = line_of(log_file, "no-key")
    assert (line["status"], line["path"], line["api_key"]) == (401, "/v1/models", None)
    assert line["prompt_tokens"] is line["ttft_s"] is None


@pytest.mark.parametrize("given", ["", "two words", "x" * 129, "sneaky\\n", "{}", "é"])
def test_an_id_that_could_harm_is_replaced(server, given):
    made = get(f"{server.url}/version", X_Request_Id=given.encode().decode("latin-1")).headers["x-request-id"]
    assert made != given
    assert len(made) == 32


def test_no_secret_and_no_text_is_ever_logged(server, client, log_file):
    """After all of the above, and an error that has the prompt's text in its answer."""
    with pytest.raises(openai.BadRequestError):
        client.completions.create(model="demo", prompt="nobody's business", max_tokens=-1)
    get(f"{server.url}/v1/nothing", X_Request_Id="last", Authorization=f"Bearer {KEYS[0]}")
    line_of(log_file, "last")
    text = log_file.read_text()
    for secret in (*KEYS, "sk-wrong", "sk-in-a-query", "nobody", "business", "Bearer"):
        assert secret not in text


def test_programs_that_watch_are_not_logged(server, log_file):
    for path in ("health", "stats", "metrics"):
        assert (
            get(f"{server.url}/{path}", X_Request_Id=f"quiet-{path}", Authorization=f"Bearer {KEYS[0]}").status == 200
        )
    get(f"{server.url}/stats", X_Request_Id="not-quiet")
    assert line_of(log_file, "not-quiet")["status"] == 401
    assert "quiet-health" not in log_file.read_text()
    assert "quiet-stats" not in log_file.read_text().replace("not-quiet", "")


def record(**fields) -> RequestRecord:
    known = {"request_id": "an-id", "method": "GET", "path": "/", "client": "127.0.0.1:9", "headers": []}
    return RequestRecord(**{**known, "started_ns": 1_700_000_000_123_000_000, "status": 200, **fields})


def test_a_line_for_people(capsys):
    log = AccessLog(LogFormat.TEXT, None, ["sk-secret"])
    metrics = RequestMetrics(
        arrival_s=1.0,
        scheduled_s=1.1,
        first_token_s=1.25,
        finished_s=2.0,
        num_prompt_tokens=12,
        num_completion_tokens=30,
    )
    log.write(record(start_s=1.0, end_s=2.5, metrics=[metrics], finish_reasons=["stop"], api_key=0))
    log.write(record(path="/a\nb\x1b[31m", status=0, is_disconnected=True, start_s=0.0, end_s=0.0))
    log.close()
    first, second = capsys.readouterr().err.splitlines()
    assert first == (
        "2023-11-14T22:13:20.123+00:00 127.0.0.1:9 GET / 200 1.500s 12+30 tokens first after 0.250s stop "
        f"{key_name('sk-secret')} an-id"
    )
    assert second == r"2023-11-14T22:13:20.123+00:00 127.0.0.1:9 GET /a\nb\x1b[31m - 0.000s client left an-id"


class BlockedStream(io.StringIO):
    """A pipe that nobody reads until it is opened."""

    def __init__(self) -> None:
        super().__init__()
        self.is_open = threading.Event()
        self.is_reached = threading.Event()
        self.text = ""

    def write(self, text: str) -> int:
        self.is_reached.set()
        assert self.is_open.wait(30)
        self.text += text
        return len(text)


def test_a_stream_that_blocks_makes_nobody_wait(monkeypatch):
    stream = BlockedStream()
    log = AccessLog(LogFormat.JSON, None, [])
    log.close()
    log._writer = LineWriter(stream, max_lines=3)
    log.write(record(request_id="0"))
    assert stream.is_reached.wait(30)
    for number in range(1, 9):
        log.write(record(request_id=str(number)))
    stream.is_open.set()
    log._writer._lines.join()
    log.write(record(request_id="9"))
    log.close()
    lines = [json.loads(line) for line in stream.text.splitlines()]
    assert [line["request_id"] for line in lines] == ["0", "1", "2", "3", "9"]
    assert [line.get("dropped_before") for line in lines] == [None, None, None, None, 5]
    assert stream.closed


def test_a_stream_that_breaks_is_reported_once(caplog):
    writer = LineWriter(FullDisk())
    for _ in range(3):
        assert writer.put("a line")
    writer.close()
    [message] = [entry.message for entry in caplog.records]
    assert message == "the access log cannot be written: [Errno 28] No space left on device"


class FullDisk(io.StringIO):
    def write(self, text: str) -> int:
        raise OSError(28, "No space left on device")


def test_options_of_the_command(tmp_path):
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    file, url = str(tmp_path / "log"), "https://collector:4318/v1/traces"
    args = parser.parse_args(["--log-format", "json", "--log-file", file, "--otlp-traces-endpoint", url])
    assert server_config(args).observability == ObservabilityConfig(
        log_format=LogFormat.JSON, log_file=Path(file), otlp_traces_endpoint=url
    )
    assert server_config(parser.parse_args([])).observability == ObservabilityConfig()


def test_a_log_that_cannot_be_written_is_refused_at_once(tmp_path):
    with pytest.raises(ConfigError, match=r"missing/log: No such file or directory"):
        AccessLog(LogFormat.JSON, tmp_path / "missing" / "log", [])
    with pytest.raises(ConfigError, match="contradict each other"):
        ObservabilityConfig(log_format=LogFormat.NONE, log_file=tmp_path / "log")


@pytest.mark.parametrize(
    ("engine_id", "expected"),
    [("chatcmpl-ab-3", "ab"), ("cmpl-a-b-c-0", "a-b-c"), ("resp_x-12", "x"), ("strange", None), ("cmpl-x", None)],
)
def test_the_request_that_the_engine_runs_for(engine_id, expected):
    assert http_id(engine_id) == expected


class Middleware:
    """`RecordedRequests` around an application of a test's own."""

    def __init__(self, app) -> None:
        self.ended: list[RequestRecord] = []
        self.recorder = Recorder([self.ended.append])
        self.app = RecordedRequests(app, recorder=self.recorder)

    async def run(self, incoming=(), headers=()) -> list[dict]:
        scope = {"type": "http", "method": "POST", "path": "/x", "headers": list(headers), "client": ("::1", 5)}
        messages, sent = list(incoming), []

        async def receive() -> dict:
            return messages.pop(0)

        async def send(message: dict) -> None:
            sent.append(message)

        await self.app(scope, receive, send)
        return sent


START = {"type": "http.response.start", "status": 201, "headers": []}
END = {"type": "http.response.body", "body": b"", "more_body": False}


def finished(request_id: str, reason: str = "abort") -> RequestUpdate:
    metrics = RequestMetrics(arrival_s=0.0, num_completion_tokens=3)
    outputs = [CompletionOutput(index=0, finish_reason=reason)]
    output = RequestOutput(request_id=request_id, prompt=None, prompt_token_ids=[1], outputs=outputs, metrics=metrics)
    return RequestUpdate(request_id, (), output)


class TestRecorder:
    def test_scope_and_answer_carry_the_id(self):
        async def app(scope, receive, send) -> None:
            scope[API_KEY] = 1
            scope["route"] = SimpleNamespace(path="/x/{name}")
            assert scope["headrace.request_id"] == "given"
            await send({**START, "headers": []})
            await send(END)

        middleware = Middleware(app)
        sent = asyncio.run(middleware.run(headers=[(b"x-request-id", b"given")]))
        assert sent[0]["headers"] == [(b"x-request-id", b"given")]
        [ended] = middleware.ended
        assert (ended.status, ended.route, ended.api_key) == (201, "/x/{name}", 1)
        assert not ended.is_disconnected

    def test_two_requests_at_a_time_never_share_an_id(self):
        async def both() -> None:
            is_over = asyncio.Event()

            async def app(scope, receive, send) -> None:
                await is_over.wait()
                await send({**START, "headers": []})
                await send(END)

            middleware = Middleware(app)
            headers = [(b"x-request-id", b"same")]
            tasks = [asyncio.create_task(middleware.run(headers=headers)) for _ in range(2)]
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            is_over.set()
            await asyncio.gather(*tasks)
            names = [ended.request_id for ended in middleware.ended]
            assert names[0] == "same"
            assert names[1].startswith("same.")
            await middleware.run(headers=headers)
            assert middleware.ended[-1].request_id == "same"

        asyncio.run(both())

    def test_an_unforeseen_error_is_a_500_and_no_client_that_left(self):
        async def app(scope, receive, send) -> None:
            raise KeyError("unforeseen")

        middleware = Middleware(app)
        with pytest.raises(KeyError):
            asyncio.run(middleware.run())
        [ended] = middleware.ended
        assert (ended.status, ended.is_disconnected) == (500, False)

    def test_an_answer_that_was_broken_off_is_one_that_nobody_took(self):
        """A client that does not read is left without a word of its own."""

        async def app(scope, receive, send) -> None:
            await send({**START, "headers": []})
            await send({"type": "http.response.body", "body": b"some", "more_body": True})

        async def give_up() -> None:
            middleware = Middleware(app)
            await middleware.run()
            middleware.recorder.close()
            [ended] = middleware.ended
            assert (ended.status, ended.is_disconnected) == (201, True)

        asyncio.run(give_up())

    def test_what_the_engine_says_of_a_client_that_left_is_waited_for(self, monkeypatch):
        monkeypatch.setattr("headrace.server.recorder._GRACE_S", 0.02)

        async def leave() -> None:
            async def app(scope, receive, send) -> None:
                await send({**START, "headers": []})
                assert (await receive())["type"] == "http.disconnect"

            middleware = Middleware(app)
            await middleware.run([{"type": "http.disconnect"}], [(b"x-request-id", b"gone")])
            assert middleware.ended == []
            middleware.recorder.watch([finished("cmpl-gone-0"), finished("cmpl-other-0")])
            await asyncio.sleep(0.1)
            [ended] = middleware.ended
            assert (ended.is_disconnected, ended.finish_reasons, ended.num_completion_tokens) == (True, ["abort"], 3)

        asyncio.run(leave())

    def test_an_end_of_the_server_reports_those_at_once(self):
        async def leave() -> None:
            async def app(scope, receive, send) -> None:
                await receive()

            middleware = Middleware(app)
            await middleware.run([{"type": "http.disconnect"}])
            middleware.recorder.close()
            assert len(middleware.ended) == 1

        asyncio.run(leave())

    def test_a_full_disk_is_no_request_s_fault(self, caplog):
        def fail(record) -> None:
            raise OSError("no space left")

        ended: list[RequestRecord] = []

        async def app(scope, receive, send) -> None:
            await send({**START, "headers": []})
            await send(END)

        recorder = Recorder([fail, ended.append])
        middleware = Middleware(app)
        middleware.app = RecordedRequests(app, recorder=recorder)
        asyncio.run(middleware.run())
        assert len(ended) == 1
        assert "could not be reported" in caplog.text
