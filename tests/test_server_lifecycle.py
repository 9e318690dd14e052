"""A server from its start to its end, as a process: signals, keys, lost ranks, and what it costs to do nothing."""

import asyncio
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import openai
import psutil
import pytest

from headrace.config.server import ServerConfig
from headrace.engine.engine import Engine
from headrace.errors import CheckpointError, ConfigError
from headrace.server.errors import Overloaded
from headrace.server.restarts import RestartPolicy
from headrace.server.serve import Serving, listen
from headrace.server.side_threads import SideThreads
from tests.serving import engine_settings, running_server

START_S = 50


@dataclass
class ServerProcess:
    process: subprocess.Popen[str]
    url: str = ""
    lines: list[str] = field(default_factory=list)

    @cached_property
    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=30)

    def get(self, path: str, timeout_s: float = 5.0) -> tuple[int, Any]:
        connection = http.client.HTTPConnection(self.url.removeprefix("http://"), timeout=timeout_s)
        try:
            connection.request("GET", path)
            response = connection.getresponse()
            return response.status, json.loads(response.read())
        finally:
            connection.close()

    def ranks(self) -> list[psutil.Process]:
        return [
            child
            for child in psutil.Process(self.process.pid).children(recursive=True)
            if any("rank_process" in part for part in child.cmdline())
        ]

    def wait_for(self, is_so: Any, timeout_s: float = 30.0) -> float:
        """Seconds until it was so."""
        started_s = time.monotonic()
        while not is_so():
            assert time.monotonic() - started_s < timeout_s, f"not within {timeout_s} s; {self.lines}"
            time.sleep(0.02)
        return time.monotonic() - started_s


@contextmanager
def server_process(*options: str, **environment: str) -> Iterator[ServerProcess]:
    """`headrace serve` on a free port, ready to answer."""
    process = subprocess.Popen(
        [sys.executable, "-m", "headrace", "serve", "--port", "0", "--dataflow", "default", *options],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
    )
    server = ServerProcess(process)
    assert process.stderr is not None
    is_ready = threading.Event()

    def read() -> None:
        for line in process.stderr:
            server.lines.append(line.rstrip())
            if match := re.search(r"ready after .* (http://\S+)", line):
                server.url = match[1]
                is_ready.set()
        is_ready.set()

    reader = threading.Thread(target=read)
    reader.start()
    try:
        assert is_ready.wait(START_S), server.lines
        yield server
    finally:
        process.kill()
        process.wait()
        reader.join()
        process.stderr.close()
        server.client.close()


def _stream(server: ServerProcess, **settings: Any) -> openai.Stream[Any]:
    return server.client.completions.create(
        model="demo", prompt="Once upon a time", stream=True, extra_body={"ignore_eos": True}, **settings
    )


def test_sigterm_lets_running_requests_end_and_takes_no_more() -> None:
    with server_process("--threads", "1") as server:
        with _stream(server, max_tokens=900) as stream:
            next(stream)
            server.process.send_signal(signal.SIGTERM)
            status, answer = server.get("/health")
            assert (status, "shutting down" in answer["error"]["message"]) == (503, True)
            with pytest.raises(openai.InternalServerError) as refused:
                server.client.completions.create(model="demo", prompt="Hello")
            assert refused.value.status_code == 503
            assert [chunk.choices[0].finish_reason for chunk in stream][-1] == "length"
        assert server.process.wait(20) == 0
    assert not [line for line in server.lines if "Traceback" in line]


def test_what_outlasts_the_drain_is_told_so() -> None:
    with running_server(drain_s=0.0) as server:
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
            long = {"max_tokens": 1000, "n": 8, "extra_body": {"ignore_eos": True}}
            with client.completions.create(model="demo", prompt="Once upon a time", stream=True, **long) as stream:
                next(stream)
                server.do(server.serving.end)
                with pytest.raises(openai.APIError, match="shutting down"):
                    list(stream)
        server.thread.join(20)
        assert not server.thread.is_alive()


def test_a_key_is_asked_for_everywhere_but_at_the_door() -> None:
    with running_server(api_keys=("first", "second")) as server:
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key="second", max_retries=0) as client:
            assert client.completions.create(model="demo", prompt="Hello", max_tokens=2).choices
        for key in ("third", "secon"):
            with (
                openai.OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0) as client,
                pytest.raises(openai.AuthenticationError),
            ):
                client.models.list()
        connection = http.client.HTTPConnection(*server.address)
        for path, status in (("/health", 200), ("/version", 200), ("/openapi.json", 401), ("/tokenize", 401)):
            connection.request("GET", path)
            response = connection.getresponse()
            response.read()
            assert (path, response.status) == (path, status)
        connection.close()


@pytest.mark.timeout(120)
def test_lost_ranks_end_what_runs_and_are_started_again_until_they_are_lost_too_often() -> None:
    """Killed and stopped while they have something to do, and killed while they have nothing."""
    options = ("--threads", "1", "--tp", "2", "--deadline", "3", "--max-restarts", "3")
    with server_process(*options) as server:
        for kill, within_s in ((signal.SIGKILL, 2), (signal.SIGSTOP, 3 + 2)):
            with _stream(server, max_tokens=1000, n=8) as stream:
                next(stream)
                lost = pytest.raises(openai.APIError, match=r"rank 1 .*send it again")
                with _lost_rank(server, kill, within_s), lost:
                    list(stream)
        with _lost_rank(server, signal.SIGKILL, 2):
            pass
        server.ranks()[0].kill()
        assert server.process.wait(20) == 2
    assert [line for line in server.lines if line.startswith("headrace: error: rank 1")]


@contextmanager
def _lost_rank(server: ServerProcess, kill: signal.Signals, within_s: float) -> Iterator[None]:
    """Goes on when the server has noticed that its rank was lost, and at the end waits until it is there again."""
    [rank] = server.ranks()
    rank.send_signal(kill)
    assert server.wait_for(lambda: server.get("/health")[0] == 503) < within_s
    yield
    server.wait_for(lambda: server.get("/health")[0] == 200)
    assert server.client.completions.create(model="demo", prompt="The", max_tokens=3).choices[0].text
    assert [process.pid for process in server.ranks()] != [rank.pid]
    assert not rank.is_running() or rank.status() == psutil.STATUS_ZOMBIE


def test_four_idle_ranks_cost_next_to_nothing_and_one_that_is_silent_is_noticed() -> None:
    with server_process("--threads", "1", "--tp", "2", "--pp", "2") as server:
        assert server.client.completions.create(model="demo", prompt="The", max_tokens=3).choices[0].text
        processes = [psutil.Process(server.process.pid), *server.ranks()]
        assert len(processes) == 4
        time.sleep(0.5)
        before_s, started_s = _cpu_s(processes), time.monotonic()
        time.sleep(3)
        assert _cpu_s(processes) - before_s < 0.02 * (time.monotonic() - started_s)
        # Long before it is given up it turns the server red, and it may come back.
        processes[-1].suspend()
        assert server.wait_for(lambda: server.get("/health")[0] == 503) < 6
        assert "no sign of life" in server.get("/health")[1]["error"]["message"]
        processes[-1].resume()
        server.wait_for(lambda: server.get("/health")[0] == 200)
        assert server.client.completions.create(model="demo", prompt="The", max_tokens=3).choices[0].text


def _cpu_s(processes: list[psutil.Process]) -> float:
    return sum(sum(process.cpu_times()[:2]) for process in processes)


def test_restarts_wait_longer_each_time_and_are_counted_in_a_window() -> None:
    policy = RestartPolicy(3, 100.0)
    assert [policy.next_delay_s(now_s) for now_s in (0.0, 1.0, 2.0)] == [0.25, 0.5, 1.0]
    assert policy.next_delay_s(50.0) is None
    assert policy.next_delay_s(101.5) == 0.5
    assert policy.num_restarts == 4


def test_a_model_that_is_still_loading_is_not_waited_for() -> None:
    """SIGTERM while a server starts was obeyed once the model had been loaded."""
    is_over = threading.Event()

    def load() -> Engine:
        is_over.wait(30)
        raise CheckpointError("nobody waits for this")

    config = ServerConfig(port=0)
    serving = Serving(load, config, model_name="demo")
    thread = threading.Thread(target=serving.run, args=(listen(config),))
    thread.start()
    try:
        while not hasattr(serving.engine, "loop"):
            time.sleep(0.01)
        serving.engine.loop.call_soon_threadsafe(serving.end)
        thread.join(10)
        assert not thread.is_alive()
        assert serving.is_stuck
    finally:
        is_over.set()


def test_jobs_that_wait_for_a_thread_are_limited() -> None:
    is_over = threading.Event()

    async def run() -> list[Any]:
        threads = SideThreads("text to be read", 1, max_waiting=2)
        jobs = [asyncio.create_task(threads.run(lambda: is_over.wait(20))) for _ in range(3)]
        await asyncio.sleep(0)
        with pytest.raises(Overloaded, match="3 requests wait for their text to be read"):
            await threads.run(lambda: None)
        # One whose client has left still holds its place until its turn has come.
        jobs[2].cancel()
        is_over.set()
        results = await asyncio.gather(*jobs, return_exceptions=True)
        assert await threads.run(lambda: "again") == "again"
        return results

    first, second, third = asyncio.run(run())
    assert (first, second) == (True, True)
    assert isinstance(third, asyncio.CancelledError)


def test_a_port_in_use_is_said_at_once() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"port {port}.*--port"):
            listen(ServerConfig(port=port))


def test_a_model_that_cannot_be_loaded_ends_the_server(tmp_path: Any) -> None:
    with pytest.raises(CheckpointError), running_server(engine_settings(tmp_path)):
        pass
