"""Requests that were accepted and have not ended: what reads them, what they take of the queue, and their time."""

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from itertools import count

from headrace.config.server import ServerConfig
from headrace.engine.outputs import RequestUpdate
from headrace.errors import RequestError
from headrace.server.admission import Admission
from headrace.server.errors import TimedOut, Unavailable
from headrace.server.request_stream import RequestStream

logger = logging.getLogger(__name__)


class OpenRequests:
    """Owns their streams and timers. All methods are for the event loop.

    abort: is told the id of each request that nobody reads any more, or that has taken too long.
    on_end: called when a request has ended.
    """

    def __init__(self, config: ServerConfig, *, abort: Callable[[str], None], on_end: Callable[[], None]) -> None:
        self.admission = Admission(config)
        self._config, self._tell_abort, self._on_end = config, abort, on_end
        self._streams: dict[str, RequestStream] = {}
        self._numbers = count()

    def __len__(self) -> int:
        return len(self._streams)

    def open(self, request_id: str, num_prompt_tokens: int, num_outputs: int) -> RequestStream:
        """A stream whose id is the one given and a number that is never used again: clients may use an id again while a
        step that ran for the first one is still on its way back."""
        request_id = f"{request_id}-{next(self._numbers)}"
        stream = self._streams[request_id] = RequestStream(request_id, num_prompt_tokens, num_outputs, self._abort)
        self.admission.enter(num_outputs, num_prompt_tokens)
        stream.timer = asyncio.get_running_loop().call_later(self._patience_s, self._end_waiting, stream)
        return stream

    def take(self, updates: Sequence[RequestUpdate]) -> None:
        """Hand updates to those who wait for them."""
        now_s = time.monotonic()
        for update in updates:
            stream = self._streams.get(update.request_id)
            if stream is None:
                continue
            if not stream.has_started and update.chunks:
                self._count_start(stream, now_s)
            stream.push(update)
            if update.finished is not None:
                self._forget(stream)

    def refuse(self, stream: RequestStream, error: Exception) -> None:
        """The engine does not take it, though it was accepted."""
        logger.error("a request that had been accepted was refused", exc_info=error)
        stream.fail(error if isinstance(error, RequestError) else Unavailable(str(error)))
        self._forget(stream)

    def fail_all(self, reason: str, *, retry_after_s: int) -> int:
        """The engine has lost them; how many they were."""
        streams = list(self._streams.values())
        for stream in streams:
            stream.fail(Unavailable(reason, retry_after_s=retry_after_s))
            self._forget(stream)
        return len(streams)

    def end_all(self, reason: str) -> None:
        """Nobody waits for them any longer."""
        for stream in list(self._streams.values()):
            stream.abort(Unavailable(reason))

    @property
    def _patience_s(self) -> float:
        return min(self._config.queue_timeout_s, self._config.request_timeout_s)

    def _end_waiting(self, stream: RequestStream) -> None:
        if stream.has_started or self._config.request_timeout_s <= self._config.queue_timeout_s:
            rest_s = self._config.request_timeout_s - self._patience_s
            stream.timer = asyncio.get_running_loop().call_later(rest_s, self._end_late, stream)
            return
        seconds = self._config.queue_timeout_s
        self.admission.num_refused["queue_timeout"] += 1
        retry_after_s = self.admission.retry_after_s(time.monotonic())
        reason = f"the request waited {seconds:g} s for its first token; try again"
        stream.abort(Unavailable(reason, retry_after_s=retry_after_s))

    def _end_late(self, stream: RequestStream) -> None:
        seconds = self._config.request_timeout_s
        stream.abort(TimedOut(f"the request took more than {seconds:g} s; ask for fewer tokens"))

    def _abort(self, request_id: str) -> None:
        stream = self._streams.get(request_id)
        if stream is not None:
            self._forget(stream)
            self._tell_abort(request_id)

    def _forget(self, stream: RequestStream) -> None:
        if self._streams.pop(stream.request_id, None) is None:
            return
        if stream.timer is not None:
            stream.timer.cancel()
        self._count_start(stream)
        self._on_end()

    def _count_start(self, stream: RequestStream, now_s: float | None = None) -> None:
        """It waits no longer: it has a token, or it has ended."""
        if not stream.has_started:
            stream.has_started = True
            self.admission.leave(stream.num_outputs, stream.num_prompt_tokens, started_s=now_s)
