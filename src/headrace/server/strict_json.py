"""JSON as it is written in the standard: a body is parsed in one place, fast, and whatever is in it, into an error at
worst."""

import json
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute
from pydantic_core import from_json

from headrace.errors import RequestError

_NO_JSON = "the header Content-Type is '{given}'; send JSON, and with it 'Content-Type: application/json'"
"""What curl's -d alone announces is a form."""

Handler = Callable[[Request], Coroutine[Any, Any, Response]]


class StrictRequest(Request):
    async def json(self) -> Any:
        """
        Raises:
            JSONDecodeError: no JSON, NaN or Infinity, half a surrogate pair, or nested too deeply.
        """
        body = await self.body()
        try:
            return from_json(body, allow_inf_nan=False)
        except ValueError as error:
            raise json.JSONDecodeError(str(error), "", 0) from None


class StrictRoute(APIRoute):
    """A route whose bodies are `StrictRequest`s, and say that they are JSON."""

    def get_route_handler(self) -> Handler:
        handle = super().get_route_handler()

        async def handle_strictly(request: Request) -> Response:
            strict = StrictRequest(request.scope, request.receive)
            if self.body_field is not None and not _announces_json(request):
                # Read all the same, so that it is not taken for the connection's next request.
                await strict.body()
                raise RequestError(_NO_JSON.format(given=request.headers.get("content-type", "")[:80]))
            return await handle(strict)

        return handle_strictly


def _announces_json(request: Request) -> bool:
    """FastAPI would take a body of another type for a string, and say that a string is no object."""
    kind, _, subtype = request.headers.get("content-type", "").partition(";")[0].strip().lower().partition("/")
    return kind == "application" and (subtype == "json" or subtype.endswith("+json"))
