"""A real server on a free port, in this process, for as long as a test needs it."""

import threading
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
