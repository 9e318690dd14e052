"""HTTP as uvicorn reads it, with what it lacks: a limit of a request's head, and an end for all of a connection's
requests."""

import asyncio
import json
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from headrace.server.errors import error_object

HEAD_TIMEOUT_S = 30.0
"""For a request's head to be complete, from the connection's beginning or the head's own: connections are limited in
number, and those that say nothing, or a letter a minute, must not keep others out."""

MAX_HEAD_BYTES = 64 * 1024
"""Of a request's line and headers, before they are complete; what comes in one read with their end is let through."""


class LimitedHttpProtocol(HttpToolsProtocol):
    """Ends a connection whose request's head goes on and on, which is kept in memory until its end. Where a client has
    sent its next request before the answer and left, the one that is being answered is told, too."""

    def __init__(self, *given: Any, **options: Any) -> None:
        super().__init__(*given, **options)
        self._is_in_head = True
        self._num_heads = self._num_head_bytes = 0
        self._cycles: list[RequestResponseCycle] = []
        self._head_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as in uvicorn
        super().connection_made(transport)
        self._head_timer = self.loop.call_later(HEAD_TIMEOUT_S, self._end_late)

    def data_received(self, data: bytes) -> None:
        if self._is_in_head and self._head_timer is None:
            self._head_timer = self.loop.call_later(HEAD_TIMEOUT_S, self._end_late)
        was_in_head, num_heads = self._is_in_head, self._num_heads
        super().data_received(data)
        if was_in_head and num_heads == self._num_heads:
            self._num_head_bytes += len(data)
            if self._num_head_bytes > MAX_HEAD_BYTES and not self.transport.is_closing():
                self._refuse()

    def on_headers_complete(self) -> None:
        self._is_in_head = False
        self._stop_timer()
        self._num_heads += 1
        self._num_head_bytes = 0
        super().on_headers_complete()
        self._cycles = [*(cycle for cycle in self._cycles if not cycle.response_complete), self.cycle]

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        for cycle in self._cycles:
            if not cycle.response_complete:
                cycle.disconnected = True
                cycle.message_event.set()
        super().connection_lost(exc)

    def on_message_complete(self) -> None:
        self._is_in_head = True
        super().on_message_complete()

    def _stop_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _end_late(self) -> None:
        self._head_timer = None
        # While an earlier request is being answered the connection has something to do.
        if self.cycle is None or self.cycle.response_complete:
            self.transport.close()

    def _refuse(self) -> None:
        # While an earlier request is being answered nothing may come between.
        if self.cycle is None or self.cycle.response_complete:
            message = f"the request's line and headers have more than {MAX_HEAD_BYTES} bytes; send fewer"
            body = json.dumps(error_object(message, "invalid_request_error", code="head_too_large")).encode()
            head = (
                "HTTP/1.1 431 Request Header Fields Too Large\r\ncontent-type: application/json\r\n"
                f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
            )
            self.transport.write(head.encode() + body)
        self.transport.close()
