"""From the engine's thread to the event loop."""

import asyncio
from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeVar

from headrace.engine.engine import Engine
from headrace.engine.outputs import RequestUpdate
from headrace.server.engine_thread import Command, Listener

T = TypeVar("T")


class LoopRelay:
    """Tells a listener on the loop what it is told itself on the engine's thread, unless the loop has ended."""

    def __init__(self, listener: Listener, loop: asyncio.AbstractEventLoop) -> None:
        self._to, self._loop = listener, loop

    def on_ready(self, engine: Engine) -> None:
        self._call(partial(self._to.on_ready, engine))

    def on_updates(self, updates: Sequence[RequestUpdate]) -> None:
        self._call(partial(self._to.on_updates, updates))

    def on_lost(self, reason: str, delay_s: float) -> None:
        self._call(partial(self._to.on_lost, reason, delay_s))

    def on_failed(self, error: BaseException) -> None:
        self._call(partial(self._to.on_failed, error))

    def _call(self, call: Callable[[], None]) -> None:
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(call)


def answered_on_loop(question: Callable[[Engine], T], answer: "asyncio.Future[T]") -> Command:
    """A command whose result, or what it raises, becomes the answer, if that is still waited for."""
    loop = answer.get_loop()

    def run(engine: Engine) -> None:
        try:
            result = question(engine)
        except Exception as error:
            loop.call_soon_threadsafe(_set_exception, answer, error)
        else:
            loop.call_soon_threadsafe(_set_result, answer, result)

    return run


def _set_result(future: "asyncio.Future[T]", result: T) -> None:
    if not future.done():
        future.set_result(result)


def _set_exception(future: "asyncio.Future[T]", error: Exception) -> None:
    if not future.done():
        future.set_exception(error)
