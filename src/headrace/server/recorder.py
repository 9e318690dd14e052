"""Follows each HTTP request from its first byte to its last: middleware, as close to the socket as can be."""

import asyncio
import logging
from collections.abc import Callable, Sequence

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from headrace.engine.outputs import RequestUpdate
from headrace.server.context import REQUEST_ID
from headrace.server.request_record import RequestRecord, given_id, http_id, new_id

logger = logging.getLogger(__name__)

_GRACE_S = 1.0
"""Until the engine has said how far the requests came that a client has left."""

OnEnd = Callable[[RequestRecord], None]


class Recorder:
    """Records of requests that are open, by id, and whom to tell when they have ended.

    Fed by the engine's updates (`watch`, see `AsyncEngine.watchers`) and by `RecordedRequests`.
    """

    def __init__(self, on_end: Sequence[OnEnd]) -> None:
        self._on_end = on_end
        self._open: dict[str, RequestRecord] = {}

    def begin(self, scope: Scope) -> RequestRecord:
        """Takes the id over that a request came with, if no other request has it at the same time."""
        request_id = given_id(scope["headers"]) or new_id()
        if request_id in self._open:
            request_id = f"{request_id[:90]}.{new_id()}"
        record = self._open[request_id] = RequestRecord.of(scope, request_id)
        return record

    def watch(self, updates: Sequence[RequestUpdate]) -> None:
        """What a step of the engine has brought."""
        for update in updates:
            if update.finished is None:
                continue
            record = self._open.get(http_id(update.request_id) or "")
            if record is not None:
                record.add(update.finished)

    def end(self, record: RequestRecord) -> None:
        """The last byte was sent, or nobody is there to take it."""
        if record.is_disconnected:
            asyncio.get_running_loop().call_later(_GRACE_S, self._close, record)
        else:
            self._close(record)

    def close(self) -> None:
        """Report what has ended and was not reported yet."""
        for record in list(self._open.values()):
            if record.end_s:
                self._close(record)

    def _close(self, record: RequestRecord) -> None:
        if self._open.pop(record.request_id, None) is None:
            return
        for tell in self._on_end:
            try:
                tell(record)
            except Exception:
                # A full disk must not become a request's fault.
                logger.exception("a request could not be reported")


class RecordedRequests:
    """Gives each request its id, which its answer carries as X-Request-Id, and records its course."""

    def __init__(self, app: ASGIApp, *, recorder: Recorder) -> None:
        self._app, self._recorder = app, recorder

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        record = self._recorder.begin(scope)
        scope[REQUEST_ID] = record.request_id
        is_answered = False

        async def watched_receive() -> Message:
            message = await receive()
            if message["type"] == "http.disconnect" and not is_answered:
                record.is_disconnected = True
            return message

        async def watched_send(message: Message) -> None:
            nonlocal is_answered
            if message["type"] == "http.response.start":
                record.status = message["status"]
                MutableHeaders(scope=message)["X-Request-Id"] = record.request_id
            elif not message.get("more_body", False):
                is_answered = True
            await send(message)

        try:
            await self._app(scope, watched_receive, watched_send)
            record.is_disconnected = record.is_disconnected or not is_answered
        except Exception:
            # Answered by whoever catches it.
            record.status = record.status or 500
            raise
        finally:
            record.end(scope)
            self._recorder.end(record)
