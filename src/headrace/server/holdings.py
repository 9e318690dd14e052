"""What a request holds of the server's: given back once, however the request ends."""

from contextlib import ExitStack

from starlette.types import ASGIApp, Receive, Scope, Send

_HOLDINGS = "headrace.holdings"


class Holdings:
    """Middleware. What is put on a request's stack is called when it was answered, was refused, failed, or lost its
    client."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with ExitStack() as held:
            scope[_HOLDINGS] = held
            await self._app(scope, receive, send)


def holdings_of(scope: Scope) -> ExitStack:
    """The stack of a request."""
    held: ExitStack = scope[_HOLDINGS]
    return held
