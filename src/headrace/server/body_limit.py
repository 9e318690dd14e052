"""Bodies that are too large, or that never arrive, end before anybody works on them."""

import asyncio

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send


class BodyRefused(HTTPException):
    """Raised to whoever reads the body. What is still on its way must not be read as the next request."""

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(status, message, {"Connection": "close"})
        self.code = code


class BodyLimit:
    """
    max_bytes: of a body, announced or not. timeout_s: for all of it to arrive.
    """

    def __init__(self, app: ASGIApp, *, max_bytes: int, timeout_s: float) -> None:
        self._app, self._max_bytes, self._timeout_s = app, max_bytes, timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        await self._app(scope, self._limited(scope, receive), send)

    def _limited(self, scope: Scope, receive: Receive) -> Receive:
        announced = _announced_bytes(scope)
        received = 0
        is_complete = False
        deadline_s = asyncio.get_running_loop().time() + self._timeout_s

        async def limited() -> Message:
            nonlocal received, is_complete
            if is_complete:
                return await receive()
            if announced > self._max_bytes:
                raise BodyRefused(413, "body_too_large", self._too_large(announced))
            try:
                async with asyncio.timeout_at(deadline_s):
                    message = await receive()
            except TimeoutError:
                reason = f"the body did not arrive within {self._timeout_s:g} s; send it again"
                raise BodyRefused(408, "body_timeout", reason) from None
            received += len(message.get("body", b""))
            is_complete = not message.get("more_body", False)
            if received > self._max_bytes:
                raise BodyRefused(413, "body_too_large", self._too_large(received))
            return message

        return limited

    def _too_large(self, num_bytes: int) -> str:
        return f"the body has {num_bytes} bytes or more; at most {self._max_bytes} may be sent"


def _announced_bytes(scope: Scope) -> int:
    for name, value in scope["headers"]:
        if name == b"content-length":
            return int(value) if value.isdigit() else 0
    return 0
