"""Requests over kept connections, as many at once as are asked for."""

import asyncio
import ssl
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeVar

from headrace.bench.serve.address import Address
from headrace.bench.serve.http_connection import HttpConnection, Listener
from headrace.bench.serve.records import Failure, FailureKind

AnyListener = TypeVar("AnyListener", bound=Listener)


class ConnectFailed(Exception):
    """There is no connection to be had; says why."""


@dataclass(kw_only=True)
class HttpClient:
    """Owns the connections to one server; the one used last is used first, so that idle ones time out.

    headers: sent with every request, beside those that HTTP needs.
    """

    address: Address
    headers: Mapping[str, str] = field(default_factory=dict)
    timeout_s: float = 600.0
    connect_timeout_s: float = 10.0
    verify: bool = True
    _idle: list[HttpConnection] = field(default_factory=list, init=False)
    _ssl: ssl.SSLContext | None = field(default=None, init=False)
    _head: bytes = field(default=b"", init=False)

    def __post_init__(self) -> None:
        self._ssl = self.address.ssl_context(verify=self.verify)
        fields = {"Host": self.address.host_header, "User-Agent": "headrace-bench", **self.headers}
        self._head = "".join(f"{name}: {value}\r\n" for name, value in fields.items()).encode("latin-1")

    def get(self, path: str) -> bytes:
        """The bytes of a request without a body."""
        return f"GET {self.address.path}{path} HTTP/1.1\r\n".encode() + self._head + b"\r\n"

    def post(self, path: str, body: bytes) -> bytes:
        """The bytes of a request with a JSON body, to be made before the clock runs."""
        kind = f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n".encode()
        return f"POST {self.address.path}{path} HTTP/1.1\r\n".encode() + self._head + kind + body

    async def exchange(self, request: bytes, listener: "EndAwaited") -> bool:
        """Send a request and wait until the listener's answer has ended or failed.

        A kept connection that turns out to have gone before a byte of the answer came is no failure of the server's:
        the request is sent again on a new one, once. Returns whether that happened. Cancelling ends the request.

        Raises:
            ConnectFailed: there was no connection.
        """
        connection, is_new = self._take_idle(), False
        if connection is None:
            connection, is_new = await self._connect(), True
        await self._run(connection, request, listener)
        if is_new or not _has_gone(connection, listener):
            return False
        listener.start_over()
        await self._run(await self._connect(), request, listener)
        return True

    def close(self) -> None:
        while self._idle:
            self._idle.pop().close()

    async def _run(self, connection: HttpConnection, request: bytes, listener: "EndAwaited") -> None:
        reason = f"no end after {self.timeout_s:g} s"
        timer = asyncio.get_running_loop().call_later(
            self.timeout_s, connection.fail, Failure(FailureKind.TIMEOUT, reason)
        )
        try:
            connection.send(request, listener)
            await listener.ended
        except BaseException:
            connection.close()
            raise
        finally:
            timer.cancel()
        if connection.is_reusable:
            self._idle.append(connection)
        else:
            connection.close()

    def _take_idle(self) -> HttpConnection | None:
        while self._idle:
            connection = self._idle.pop()
            if connection.is_reusable:
                return connection
        return None

    async def _connect(self) -> HttpConnection:
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(self.connect_timeout_s):
                _, connection = await loop.create_connection(
                    HttpConnection, self.address.host, self.address.port, ssl=self._ssl
                )
        except TimeoutError:
            raise ConnectFailed(f"no connection after {self.connect_timeout_s:g} s") from None
        except OSError as error:
            raise ConnectFailed(_one_reason(error)) from error
        return connection


class EndAwaited:
    """A listener that can be waited for; subclasses read the answer."""

    def __init__(self) -> None:
        self.start_over()

    def start_over(self) -> None:
        """Forget what a lost connection has brought."""
        self.failure: Failure | None = None
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def on_head(self, status: int, headers: dict[bytes, bytes]) -> None:
        raise NotImplementedError

    def on_body(self, piece: bytes, now_s: float) -> None:
        raise NotImplementedError

    def on_end(self, failure: Failure | None, now_s: float) -> None:  # noqa: ARG002
        self.failure = self.failure or failure
        if not self.ended.done():
            self.ended.set_result(None)


def _has_gone(connection: HttpConnection, listener: EndAwaited) -> bool:
    failure = listener.failure
    return failure is not None and failure.kind is FailureKind.DISCONNECT and not connection.has_answered


def _one_reason(error: OSError) -> str:
    """asyncio joins what it has met at each of a name's addresses; one of them says enough."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"TLS: the certificate was not accepted: {error.verify_message}"
    if isinstance(error, ssl.SSLError):
        return f"TLS: {error.reason or error}"
    return error.strerror or str(error)
