"""A real server on a free port, in this process, for as long as a test needs it."""

import asyncio
import json
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from headrace.config import CacheConfig, DataflowChoice, EngineConfig, LoadConfig, ParallelConfig, SchedulerConfig
from headrace.config.server import ServerConfig
from headrace.demo_model import demo_model_path
from headrace.engine.engine import Engine
from headrace.engine.load import load_model
from headrace.server.serve import Serving, listen

START_S = 60


@dataclass(frozen=True)
class RunningServer:
    """url: such as http://127.0.0.1:1234, without a slash at its end."""

    url: str
    serving: Serving
    thread: threading.Thread

    @property
    def address(self) -> tuple[str, int]:
        host, port = self.url.removeprefix("http://").split(":")
        return host, int(port)

    def connect(self) -> socket.socket:
        """A bare connection, for what no well-behaved client does."""
        return socket.create_connection(self.address, timeout=20)

    def ask(self, question: Callable[[Engine], Any]) -> Any:
        """Look at the engine between two steps."""
        engine = self.serving.engine
        return asyncio.run_coroutine_threadsafe(engine.ask(question), engine.loop).result(20)

    def wait_for(self, condition: Callable[[Engine], bool], timeout_s: float = 20) -> None:
        self.wait_until(lambda: bool(self.ask(condition)), timeout_s)

    def assert_nothing_stays_behind(self) -> None:
        """Once all requests have ended: neither work nor anything that they held."""
        self.wait_for(lambda engine: not engine.has_unfinished)
        self.ask(lambda engine: engine.check_integrity())
        assert self.serving.engine.num_open == 0
        admission = self.serving.engine.admission
        assert admission.num_requests == admission.num_tokens == 0
        # A client may read its answer's last byte a moment before the server is done with it.
        self.wait_until(lambda: admission.logprob_bytes == admission.body_bytes == 0)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """No step runs."""
        is_held, is_over = threading.Event(), threading.Event()

        def hold(_: Engine) -> None:
            is_held.set()
            is_over.wait(20)

        self.do(lambda: self.serving.engine._thread.do(hold))
        assert is_held.wait(20)
        try:
            yield
        finally:
            is_over.set()

    def wait_until(self, condition: Callable[[], bool], timeout_s: float = 20) -> None:
        deadline_s = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < deadline_s, f"it did not come to be within {timeout_s} s"
            time.sleep(0.01)

    def do(self, function: Callable[[], Any]) -> None:
        """Call something on the server's own loop."""
        self.serving.engine.loop.call_soon_threadsafe(function)


def engine_settings(
    model: Path | str | None = None,
    *,
    cache: dict[str, Any] | None = None,
    scheduler: dict[str, Any] | None = None,
    parallel: dict[str, Any] | None = None,
    **load: Any,
) -> EngineConfig:
    """The demo model unless told otherwise, on one thread."""
    return EngineConfig(
        load=LoadConfig(model=str(model or demo_model_path()), **load),
        cache=CacheConfig(**{"num_blocks": 512, **(cache or {})}),
        scheduler=SchedulerConfig(**(scheduler or {})),
        parallel=ParallelConfig(**(parallel or {})),
        dataflow=DataflowChoice.DEFAULT,
        num_threads=1,
    )


@contextmanager
def running_server(
    settings: EngineConfig | None = None, *, load: Callable[[], Engine] | None = None, **config: Any
) -> Iterator[RunningServer]:
    """
    settings: of the engine; load: makes it in another way. config: fields of `ServerConfig`.
    """
    settings = settings or engine_settings()
    server_config = ServerConfig(**{"port": 0, "drain_s": 5.0, **config})
    listener = listen(server_config)
    is_ready = threading.Event()
    failures: list[BaseException] = []
    serving = Serving(
        load or (lambda: Engine(load_model(settings))), server_config, model_name="demo", on_ready=is_ready.set
    )

    def run() -> None:
        try:
            serving.run(listener)
        except BaseException as error:
            failures.append(error)
        finally:
            is_ready.set()

    thread = threading.Thread(target=run, name="test-server")
    thread.start()
    is_ready.wait(START_S)
    if failures:
        thread.join()
        raise failures[0]
    server = RunningServer(f"http://127.0.0.1:{listener.getsockname()[1]}", serving, thread)
    try:
        yield server
    finally:
        if thread.is_alive():
            server.do(serving.end)
        thread.join(START_S)
        assert not thread.is_alive(), "the server does not end"


def demo_with_template(folder: Path, template: str) -> Path:
    """The demo model with another chat template, in a new folder."""
    shutil.copytree(demo_model_path(), folder)
    (folder / "chat_template.jinja").write_text(template)
    return folder


def raw_request(body: dict[str, Any], path: str = "/v1/completions", headers: str = "") -> bytes:
    """An HTTP request as it goes over the wire."""
    data = json.dumps(body).encode()
    head = (
        f"POST {path} HTTP/1.1\r\nHost: test\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(data)}\r\n{headers}\r\n"
    )
    return head.encode() + data
