"""One HTTP/1.1 connection that asks and listens, as lean as Python allows: it shares the machine with the server."""

import asyncio
import time
from typing import Protocol, cast

import httptools

from headrace.bench.serve.records import Failure, FailureKind


class Listener(Protocol):
    """What becomes of one response. `on_end` comes exactly once, with or without a failure."""

    def on_head(self, status: int, headers: dict[bytes, bytes]) -> None:
        """Names of headers are in lower case."""

    def on_body(self, piece: bytes, now_s: float) -> None: ...

    def on_end(self, failure: Failure | None, now_s: float) -> None: ...


class HttpConnection(asyncio.Protocol):
    """Carries one request at a time. All that comes in one read has that read's time.

    is_reusable: after an answer, whether another request may follow. has_answered: the first byte of the current
    answer has come.
    """

    def __init__(self) -> None:
        self.is_reusable = True
        self.has_answered = False
        self._transport: asyncio.Transport | None = None
        self._listener: Listener | None = None
        self._parser = httptools.HttpResponseParser(self)
        self._headers: dict[bytes, bytes] = {}
        self._has_head = self._is_sized = False
        self._now_s = 0.0

    def send(self, request: bytes, listener: Listener) -> None:
        assert self._listener is None, "one request at a time"
        assert self._transport is not None, "send follows connection_made"
        self._listener, self.has_answered = listener, False
        self._headers = {}
        self._has_head = self._is_sized = False
        self._transport.write(request)

    def fail(self, failure: Failure) -> None:
        """End the request under way, and the connection with it."""
        self._now_s = time.perf_counter()
        self._end(failure)
        self.close()

    def close(self) -> None:
        self.is_reusable = False
        if self._transport is not None:
            self._transport.abort()

    # What asyncio calls.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        self._now_s = time.perf_counter()
        if self._listener is None:
            self.close()  # nobody has asked
            return
        self.has_answered = True
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserCallbackError:
            raise  # a fault of ours
        except httptools.HttpParserError as error:
            self.fail(Failure(FailureKind.MALFORMED, f"no HTTP answer: {error}"))

    def connection_lost(self, exc: Exception | None) -> None:
        self.is_reusable = False
        self._now_s = time.perf_counter()
        if self._has_head and not self._is_sized and exc is None:
            self._end(None)  # its length was told by its end
        else:
            reason = (
                f"{type(exc).__name__}: {exc}" if exc else "the server closed the connection before the answer ended"
            )
            self._end(Failure(FailureKind.DISCONNECT, reason))

    # What httptools calls.

    def on_header(self, name: bytes, value: bytes) -> None:
        name = name.lower()
        self._headers[name] = value
        self._is_sized |= name in (b"content-length", b"transfer-encoding")

    def on_headers_complete(self) -> None:
        status = self._parser.get_status_code()
        self._has_head = status >= 200
        if self._listener is not None and self._has_head:
            self._listener.on_head(status, self._headers)

    def on_body(self, body: bytes) -> None:
        if self._listener is not None:
            self._listener.on_body(body, self._now_s)

    def on_message_complete(self) -> None:
        if self._parser.get_status_code() < 200:
            self._headers = {}
            return
        self.is_reusable = self.is_reusable and self._parser.should_keep_alive()
        self._end(None)

    def _end(self, failure: Failure | None) -> None:
        listener, self._listener = self._listener, None
        if listener is not None:
            listener.on_end(failure, self._now_s)
