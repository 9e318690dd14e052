"""Clients that leave, and clients that are slow: their requests end, and nobody else's."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Sequence
from contextlib import asynccontextmanager
from typing import TypeVar

from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from headrace.errors import HeadraceError
from headrace.server.encoding import event
from headrace.server.errors import ClientLeft, headers_of, object_of, status_of
from headrace.server.request_stream import RequestStream

T = TypeVar("T")

DONE = b"data: [DONE]\n\n"


async def finish_for(receive: Receive, streams: Sequence[RequestStream], result: Awaitable[T]) -> T:
    """Wait for what is made of some streams; if the client leaves before, they end.

    Raises:
        ClientLeft: it has left. And what `result` raises, after all streams were ended.
    """
    async with ended_with_client(receive, streams):
        return await result


@asynccontextmanager
async def ended_with_client(receive: Receive, streams: Sequence[RequestStream]) -> AsyncIterator[None]:
    """Streams end when the client leaves, and when the block is left."""
    watcher = asyncio.create_task(_end_when_left(receive, streams))
    try:
        yield
    finally:
        watcher.cancel()
        _end_all(streams)


class EventStream(Response):
    """Server-sent events of some streams.

    Nothing is sent before the first event is there, so that a request that fails before has its own status; one that
    fails later says so in an event, and ends.

    slow_reader_s: what a client may take to read what it was sent.
    """

    media_type = "text/event-stream"

    def __init__(
        self, events: AsyncGenerator[bytes, None], streams: Sequence[RequestStream], *, slow_reader_s: float
    ) -> None:
        super().__init__(headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        # Its end is the connection's to tell.
        del self.headers["content-length"]
        self._events, self._streams, self._slow_reader_s = events, streams, slow_reader_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with ended_with_client(receive, self._streams):
            try:
                first = await anext(self._events)
            except HeadraceError as error:
                await error_response(error)(scope, receive, send)
                return
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            try:
                await self._send_all(first, send)
            finally:
                await self._events.aclose()

    async def _send_all(self, first: bytes, send: Send) -> None:
        try:
            await self._send(first, send)
            async for data in self._events:
                await self._send(data, send)
        except ClientLeft:
            return
        except HeadraceError as error:
            await self._send(event(object_of(error)) + DONE, send)
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _send(self, data: bytes, send: Send) -> None:
        try:
            async with asyncio.timeout(self._slow_reader_s):
                await send({"type": "http.response.body", "body": data, "more_body": True})
        except TimeoutError:
            raise ClientLeft("the client does not read its answer") from None


def error_response(error: HeadraceError) -> JSONResponse:
    return JSONResponse(object_of(error), status_of(error), headers_of(error))


async def _end_when_left(receive: Receive, streams: Sequence[RequestStream]) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    _end_all(streams)


def _end_all(streams: Sequence[RequestStream]) -> None:
    for stream in streams:
        stream.abort(ClientLeft("the client has left"))
