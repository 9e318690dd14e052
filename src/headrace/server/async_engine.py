"""The engine as the event loop sees it: requests go in, streams come out, and it is there again after it was lost."""

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeVar

from headrace.config import PoolingParams, SamplingParams
from headrace.config.server import ServerConfig
from headrace.engine.engine import Engine
from headrace.engine.grammar import Grammar
from headrace.engine.outputs import RequestUpdate
from headrace.server.engine_thread import EngineState, EngineThread
from headrace.server.errors import Unavailable
from headrace.server.loop_relay import LoopRelay, answered_on_loop
from headrace.server.open_requests import OpenRequests
from headrace.server.request_stream import RequestStream
from headrace.server.restarts import RestartPolicy

logger = logging.getLogger(__name__)

_RETRY_AFTER_S = 5
_SHUTTING_DOWN = "the server is shutting down"
_SILENT_S = 2.5
"""Ranks are heard of twice a second. One that is silent for so long is not lost yet, but no place to send anything."""

_STALLED_STEP_S = 120.0
"""A step that takes longer is taken for one that does not end."""

T = TypeVar("T")


class AsyncEngine:
    """Owns the engine's thread, and knows how it is. All methods are for the one event loop that `start` ran on.

    load: makes an engine, on that thread; called again when its ranks were lost.
    can_restart: whether that could work; ranks of a launcher end with the job.
    on_failed: called once if there is no engine and will be none.
    """

    def __init__(
        self,
        load: Callable[[], Engine],
        config: ServerConfig,
        *,
        can_restart: bool = True,
        on_failed: Callable[[BaseException], None] = lambda _: None,
    ) -> None:
        self.config = config
        self.restarts = RestartPolicy(config.max_restarts if can_restart else 0, config.restart_window_s)
        self.state = EngineState.STARTING
        self.is_draining = False
        self.reason = ""
        """Why the engine is not ready."""
        self.num_lost = 0
        """Requests that ended with their engine."""
        self.watchers: list[Callable[[Sequence[RequestUpdate]], None]] = []
        """Called on the loop with what each step has brought, and with what is left of a request that was aborted."""
        self._changed = asyncio.Event()
        self._requests = OpenRequests(config, abort=self._abort, on_end=self._changed.set)
        self.admission = self._requests.admission
        self._on_failed = on_failed
        self._engine: Engine | None = None
        self._error: BaseException | None = None
        self._thread = EngineThread(load, self.restarts)

    async def start(self) -> None:
        """Load the engine; returns when it is ready, or is not needed any more.

        Raises: what `load` raises.
        """
        self.loop = asyncio.get_running_loop()
        self._thread.start(LoopRelay(self, self.loop))
        await self.wait_until(lambda: self.state is not EngineState.STARTING or self.is_draining)
        if self._error is not None:
            raise self._error

    async def wait_until(self, condition: Callable[[], bool]) -> None:
        """Until it holds; looked at whenever the state changes, or a request ends."""
        while not condition():
            self._changed.clear()
            await self._changed.wait()

    @property
    def engine(self) -> Engine:
        """For what never changes of it, such as the model's facts.

        Raises:
            Unavailable: there is none at the moment.
        """
        if self._engine is None:
            raise self._unavailable()
        return self._engine

    @property
    def num_open(self) -> int:
        """Requests that have not ended."""
        return len(self._requests)

    @property
    def trouble(self) -> str | None:
        """Why the server cannot answer requests now; None if it can. Knows of a lost rank before any step meets it."""
        if self.is_draining:
            return _SHUTTING_DOWN
        if self.state is not EngineState.READY or self._engine is None:
            return self.reason or f"the engine is {self.state.value}"
        if self._engine.failure is not None:
            return self._engine.failure
        rank, silent_s = self._engine.silence
        if silent_s > _SILENT_S:
            return f"{rank} has shown no sign of life for {silent_s:.0f} s"
        began_s = self._thread.step_began_s
        if began_s is not None and time.monotonic() - began_s > _STALLED_STEP_S:
            return f"a step has been running for more than {_STALLED_STEP_S:g} s"
        return None

    def submit(
        self,
        request_id: str,
        prompt_token_ids: Sequence[int],
        params: SamplingParams | PoolingParams,
        prompt: str | None = None,
        grammar: Grammar | None = None,
    ) -> RequestStream:
        """Queue a request that generates, or a prompt of which an embedding is to be made; `check` and `admission` have
        let it pass, together with all that come with it. The stream's id is the engine's."""
        stream = self._requests.open(request_id, len(prompt_token_ids), params.n)
        self._thread.do(partial(self._add, stream, tuple(prompt_token_ids), params, prompt, grammar))
        return stream

    def check(self, prompt_token_ids: Sequence[int], params: SamplingParams | PoolingParams) -> None:
        """
        Raises:
            RequestError: it can never run; says why.
            Unavailable: no engine, or the server is about to end.
        """
        if self.trouble is not None:
            raise self._unavailable()
        self.engine.check_request(prompt_token_ids, params)

    async def ask(self, question: Callable[[Engine], T]) -> T:
        """The answer to something that only the engine's thread may look at, between two steps.

        Raises:
            Unavailable: the engine was lost before it could answer; and what the question raises.
        """
        if self._engine is None:
            raise self._unavailable()
        answer: asyncio.Future[T] = self.loop.create_future()
        self._thread.do(answered_on_loop(question, answer))
        lost = asyncio.create_task(self.wait_until(lambda: self._engine is None))
        try:
            await asyncio.wait((answer, lost), return_when=asyncio.FIRST_COMPLETED)
        finally:
            lost.cancel()
        if not answer.done():
            raise self._unavailable()
        return answer.result()

    async def drain(self) -> None:
        """Take no more requests, and wait for those that run, as long as `drain_s` allows; then end them."""
        self.is_draining = True
        self._changed.set()
        try:
            await asyncio.wait_for(self.wait_until(lambda: not self._requests), self.config.drain_s)
        except TimeoutError:
            self._requests.end_all(_SHUTTING_DOWN)

    async def close(self, patience_s: float) -> bool:
        """End the engine after the step that runs, or the model is loaded; false if that takes longer than patience_s,
        and the thread still runs."""
        self.is_draining = True
        self._requests.end_all(_SHUTTING_DOWN)
        return await asyncio.to_thread(self._thread.stop, patience_s)

    def _add(
        self,
        stream: RequestStream,
        prompt_token_ids: tuple[int, ...],
        params: SamplingParams | PoolingParams,
        prompt: str | None,
        grammar: Grammar | None,
        engine: Engine,
    ) -> None:
        """On the engine's thread."""
        if stream.is_ended:
            return
        try:
            if isinstance(params, PoolingParams):
                engine.add_pooling_request(stream.request_id, prompt_token_ids, params, prompt)
            else:
                engine.add_request(stream.request_id, prompt_token_ids, params, prompt, grammar)
        except Exception as error:
            self.loop.call_soon_threadsafe(self._requests.refuse, stream, error)

    def _abort(self, request_id: str) -> None:
        self._thread.do(partial(self._drop, request_id))

    def _drop(self, request_id: str, engine: Engine) -> None:
        """On the engine's thread."""
        update = engine.abort(request_id)
        if update is not None:
            self.loop.call_soon_threadsafe(self._show, (update,))

    def _show(self, updates: Sequence[RequestUpdate]) -> None:
        for watch in self.watchers:
            watch(updates)

    def _unavailable(self) -> Unavailable:
        reason = self.trouble or "the engine is not ready"
        return Unavailable(f"{reason}; try again later", retry_after_s=_RETRY_AFTER_S)

    # What follows is told by the engine's thread, on the loop.

    def on_updates(self, updates: Sequence[RequestUpdate]) -> None:
        """Hand updates to those who wait for them."""
        self._show(updates)
        self._requests.take(updates)

    def on_ready(self, engine: Engine) -> None:
        if self.state is EngineState.RECOVERING:
            logger.warning("the engine is back; requests are answered again")
        self._engine = engine
        self._set_state(EngineState.READY, "")

    def on_lost(self, reason: str, delay_s: float) -> None:
        self._engine = None
        self._set_state(EngineState.RECOVERING, reason)
        logger.error("the engine was lost: %s; %d requests end, next start in %g s", reason, self.num_open, delay_s)
        self._fail_all(reason)

    def on_failed(self, error: BaseException) -> None:
        self._engine, self._error = None, error
        self._set_state(EngineState.FAILED, str(error))
        self._fail_all(str(error))
        self._on_failed(error)

    def _fail_all(self, reason: str) -> None:
        lost = f"the request was lost: {reason}; send it again"
        self.num_lost += self._requests.fail_all(lost, retry_after_s=_RETRY_AFTER_S)

    def _set_state(self, state: EngineState, reason: str) -> None:
        self.state, self.reason = state, reason
        self._changed.set()
