"""The OpenAPI document: what FastAPI makes of the routes, with the errors that they really answer with."""

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel

from headrace import __version__


class ErrorBody(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorResponse(BaseModel):
    """OpenAI's error object."""

    error: ErrorBody


_REASONS: dict[int, str] = {
    400: "a field is wrong, unknown or not supported; the message names it",
    401: "no API key, or a wrong one",
    404: "no such model",
    408: "the body did not arrive in time",
    413: "the body is too large",
    429: "too many requests wait; see Retry-After",
    500: "the server failed",
    503: "the engine is not ready; see Retry-After",
    504: "the request took too long",
}

Answers = dict[int | str, dict[str, Any]]


def answers(*, streams: bool = False) -> Answers:
    """What a route that runs the model may answer with; streams: also as events."""
    found: Answers = {status: {"model": ErrorResponse, "description": text} for status, text in _REASONS.items()}
    content: dict[str, Any] = {"application/json": {"schema": {"type": "object"}}}
    if streams:
        content["text/event-stream"] = {"schema": {"type": "string"}}
    return {200: {"description": "the answer", "content": content}, **found}


def describe(app: FastAPI) -> dict[str, Any]:
    """The document. FastAPI lists 422 for every body; this server answers 400."""
    if app.openapi_schema is None:
        document = get_openapi(title="Headrace", version=__version__, routes=app.routes)
        for path in document.get("paths", {}).values():
            for operation in path.values():
                operation.get("responses", {}).pop("422", None)
        schemas = document.get("components", {}).get("schemas", {})
        for name in ("HTTPValidationError", "ValidationError"):
            schemas.pop(name, None)
        app.openapi_schema = document
    return app.openapi_schema
