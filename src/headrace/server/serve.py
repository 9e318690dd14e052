"""A server from its start to its end: a socket, an engine, signals."""

import asyncio
import contextlib
import logging
import signal
import socket
import sys
from collections.abc import Callable, Iterator

import uvicorn

from headrace.config.server import ServerConfig
from headrace.engine.engine import Engine
from headrace.errors import ConfigError, HeadraceError
from headrace.server.app import build_app
from headrace.server.async_engine import AsyncEngine
from headrace.server.context import ServerContext
from headrace.server.engine_thread import EngineState
from headrace.server.http_protocol import LimitedHttpProtocol
from headrace.server.observability import Observability

logger = logging.getLogger(__name__)

_BACKLOG = 2048
_LAST_STEP_S = 30.0
_LAST_WORDS_S = 5.0
"""For connections to close in, once nothing runs any more."""


def listen(config: ServerConfig) -> socket.socket:
    """A socket that listens, before any time goes into loading a model.

    What a client does not take in for `slow_reader_s` closes its connection: the system sees to that.

    Raises:
        ConfigError: the address cannot be had.
    """
    listener = None
    try:
        family, kind, _, _, address = socket.getaddrinfo(config.host, config.port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if hasattr(socket, "TCP_USER_TIMEOUT"):
            # 0 would be the system's own, far longer one.
            timeout_ms = max(1, round(config.slow_reader_s * 1000))
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, timeout_ms)
        listener.bind(address)
        listener.listen(_BACKLOG)
    except OSError as error:
        if listener is not None:
            listener.close()
        reason = error.strerror or error
        raise ConfigError(
            f"cannot listen on {config.host} port {config.port}: {reason}; choose another with --host and --port"
        ) from None
    return listener


class HttpServer(uvicorn.Server):
    """uvicorn's server, whose signals are somebody else's."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class Serving:
    """One run of a server.

    load: makes the engine, on a thread of its own.
    on_ready: called when requests can be answered.
    """

    def __init__(
        self,
        load: Callable[[], Engine],
        config: ServerConfig,
        *,
        model_name: str,
        can_restart: bool = True,
        on_ready: Callable[[], None] = lambda: None,
    ) -> None:
        self._config, self._on_ready = config, on_ready
        self._failure: BaseException | None = None
        self._num_signals = 0
        self._ending: asyncio.Task[None] | None = None
        self._is_hurried = asyncio.Event()
        self.is_stuck = False
        """The engine still loads, or is in a step that does not end: its thread cannot be ended without the process."""
        self.engine = AsyncEngine(load, config, can_restart=can_restart, on_failed=self._on_failed)
        self.context = ServerContext(engine=self.engine, config=config, model_name=model_name)
        app = build_app(self.context)
        self._observability: Observability = app.state.observability
        self.http = HttpServer(
            uvicorn.Config(
                app,
                http=LimitedHttpProtocol,
                access_log=False,
                log_config=None,
                log_level=logging.WARNING,
                lifespan="off",
                server_header=False,
                backlog=_BACKLOG,
                limit_concurrency=config.max_connections,
                timeout_graceful_shutdown=int(_LAST_WORDS_S),
                ws="none",
            )
        )

    def run(self, listener: socket.socket) -> None:
        """Serve until a signal ends it.

        Raises:
            HeadraceError: the engine cannot be loaded, or was lost for good.
        """
        factory = self.http.config.get_loop_factory()
        with asyncio.Runner(loop_factory=factory) as runner:
            runner.run(self.serve(listener))

    async def serve(self, listener: socket.socket) -> None:
        """See `run`; from a loop that runs already."""
        self._install_signals()
        http = asyncio.create_task(self.http.serve(sockets=[listener]))
        try:
            await self.engine.start()
            if self.engine.state is EngineState.READY:
                self._on_ready()
        except BaseException:
            self.http.should_exit = True
            await http
            self._observability.close()
            raise
        await http
        self.is_stuck = not await self._close_engine()
        await asyncio.to_thread(self._observability.close)
        if self._failure is not None:
            raise self._failure

    def end(self) -> None:
        """The first time: take no more requests, and end when those that run have. The second time: at once."""
        self._num_signals += 1
        if self._num_signals > 1:
            self.http.force_exit = self.http.should_exit = True
            self._is_hurried.set()
        elif self._ending is None:
            self._ending = asyncio.get_running_loop().create_task(self._end())

    async def _close_engine(self) -> bool:
        """After the step that runs; a model that is being loaded, or whoever sends two signals, is not waited for."""
        patience_s = 0.0 if self.engine.state is EngineState.STARTING else _LAST_STEP_S
        closing = asyncio.create_task(self.engine.close(patience_s))
        hurried = asyncio.create_task(self._is_hurried.wait())
        await asyncio.wait((closing, hurried), return_when=asyncio.FIRST_COMPLETED)
        hurried.cancel()
        return closing.done() and closing.result()

    async def _end(self) -> None:
        num_open = self.engine.num_open
        if num_open:
            _say(f"waiting up to {self._config.drain_s:g} s for {num_open} requests to end; once more ends at once")
        await self.engine.drain()
        self.http.should_exit = True

    def _on_failed(self, error: BaseException) -> None:
        """A server without an engine, for good, is no use: whoever started it may start it again."""
        self._failure = error if isinstance(error, HeadraceError) else HeadraceError(f"{type(error).__name__}: {error}")
        self.http.should_exit = True

    def _install_signals(self) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            with contextlib.suppress(NotImplementedError, ValueError, RuntimeError):
                loop.add_signal_handler(number, self.end)


def _say(text: str) -> None:
    print(f"headrace: {text}", file=sys.stderr, flush=True)
