"""Bodies that are too large, that never arrive, or that are too many at once end before anybody works on them."""

import asyncio

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from headrace.server.admission import Admission
from headrace.server.errors import Unavailable, headers_of


class BodyRefused(HTTPException):
    """Raised to whoever reads the body. What is still on its way must not be read as the next request."""

    kind = "invalid_request_error"

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(status, message, {"Connection": "close"})
        self.code = code


class BodyPutOff(BodyRefused):
    """There is no room for it now."""

    def __init__(self, error: Unavailable) -> None:
        super().__init__(error.status, "too_many_bodies", str(error))
        self.kind = error.kind
        self.headers = {"Connection": "close", **headers_of(error)}


class BodyLimit:
    """
    max_bytes: of a body, announced or not. timeout_s: for all of it to arrive.
    admission: limits the bytes of all bodies together, from their arrival until their requests have ended.
    """

    def __init__(self, app: ASGIApp, *, max_bytes: int, timeout_s: float, admission: Admission) -> None:
        self._app, self._max_bytes, self._timeout_s, self._admission = app, max_bytes, timeout_s, admission

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        body = _Body(receive, _announced_bytes(scope), self._max_bytes, self._timeout_s, self._admission)
        try:
            await self._app(scope, body.receive, send)
        finally:
            self._admission.release_body(body.held_bytes)


class _Body:
    """One body while it arrives.

    held_bytes: what it has been let in with.
    """

    def __init__(
        self, receive: Receive, announced_bytes: int, max_bytes: int, timeout_s: float, admission: Admission
    ) -> None:
        self._receive, self._admission = receive, admission
        self._announced_bytes, self._max_bytes, self._timeout_s = announced_bytes, max_bytes, timeout_s
        self._deadline_s = asyncio.get_running_loop().time() + timeout_s
        self._is_complete = False
        self.held_bytes = 0

    async def receive(self) -> Message:
        """
        Raises:
            BodyRefused: it is too large, too late, or too much beside those of others.
        """
        if self._is_complete:
            return await self._receive()
        self._check_size(self._announced_bytes)
        try:
            async with asyncio.timeout_at(self._deadline_s):
                message = await self._receive()
        except TimeoutError:
            reason = f"the body did not arrive within {self._timeout_s:g} s; send it again"
            raise BodyRefused(408, "body_timeout", reason) from None
        self._hold(len(message.get("body", b"")))
        self._is_complete = not message.get("more_body", False)
        return message

    def _hold(self, num_bytes: int) -> None:
        self._check_size(self.held_bytes + num_bytes)
        try:
            self._admission.hold_body(num_bytes)
        except Unavailable as error:
            raise BodyPutOff(error) from None
        self.held_bytes += num_bytes

    def _check_size(self, num_bytes: int) -> None:
        if num_bytes > self._max_bytes:
            reason = f"the body has {num_bytes} bytes or more; at most {self._max_bytes} may be sent"
            raise BodyRefused(413, "body_too_large", reason)


def _announced_bytes(scope: Scope) -> int:
    for name, value in scope["headers"]:
        if name == b"content-length":
            return int(value) if value.isdigit() else 0
    return 0
