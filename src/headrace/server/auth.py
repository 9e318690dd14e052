"""API keys: whoever has none learns that the server is there, and nothing else."""

import hmac
from collections.abc import Sequence

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from headrace.server.errors import error_object

OPEN_PATHS = frozenset({"/", "/health", "/version"})
OPEN_PREFIX = "/page/"
"""What the page is made of."""

API_KEY = "headrace.api_key"
"""Where a request's scope keeps the index of the key it came with."""


class ApiKeys:
    """Lets requests through that carry `Authorization: Bearer KEY`, and those for open paths."""

    def __init__(self, app: ASGIApp, *, keys: Sequence[str]) -> None:
        self._app = app
        self._keys = [key.encode() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not self._keys or _is_open(scope):
            await self._app(scope, receive, send)
            return
        index = self._index_of(_bearer_token(scope))
        if index is None:
            body = error_object(
                "the API key is missing or wrong; send it as 'Authorization: Bearer KEY'",
                "authentication_error",
                code="invalid_api_key",
            )
            await JSONResponse(body, 401, {"WWW-Authenticate": "Bearer"})(scope, receive, send)
            return
        scope[API_KEY] = index
        await self._app(scope, receive, send)

    def _index_of(self, token: bytes) -> int | None:
        """Compares with all keys, each in the same time whatever the token is."""
        found = None
        for index, key in enumerate(self._keys):
            if hmac.compare_digest(token, key):
                found = index
        return found


def _is_open(scope: Scope) -> bool:
    path = scope["path"]
    return path in OPEN_PATHS or path.startswith(OPEN_PREFIX)


def _bearer_token(scope: Scope) -> bytes:
    for name, value in scope["headers"]:
        if name == b"authorization":
            kind, _, token = value.partition(b" ")
            return bytes(token.strip()) if kind.lower() == b"bearer" else b""
    return b""
