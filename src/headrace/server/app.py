"""The application: routes, and what every request passes on its way to them."""

import logging
from difflib import get_close_matches

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import JSONResponse

from headrace import __version__
from headrace.errors import HeadraceError
from headrace.server.auth import ApiKeys
from headrace.server.body_limit import BodyLimit
from headrace.server.clients import error_response
from headrace.server.context import ServerContext, request_id_of
from headrace.server.errors import ServerError, error_object, explain_validation
from headrace.server.holdings import Holdings
from headrace.server.observability import Observability
from headrace.server.openapi import describe
from headrace.server.page import page_routes
from headrace.server.recorder import RecordedRequests
from headrace.server.routes import chat, completions, embeddings, metrics, models, responses, text

logger = logging.getLogger(__name__)

_ROUTERS = (
    models.router,
    metrics.router,
    completions.router,
    chat.router,
    responses.router,
    embeddings.router,
    text.router,
)


def build_app(context: ServerContext) -> FastAPI:
    """An ASGI application that serves one engine."""
    app = FastAPI(title="Headrace", version=__version__, docs_url=None, redoc_url=None)
    app.state.context = context
    app.state.observability = Observability(context)
    app.openapi = lambda: describe(app)  # type: ignore[method-assign]
    for router in _ROUTERS:
        app.include_router(router)
    if context.config.page:
        app.router.routes.extend(page_routes())
    app.add_exception_handler(HeadraceError, _answer_headrace_error)
    app.add_exception_handler(RequestValidationError, _answer_validation_error)
    app.add_exception_handler(HTTPException, _answer_http_error)
    app.add_exception_handler(Exception, _answer_unforeseen)
    config = context.config
    # The last one added is the first one that a request meets.
    app.add_middleware(Holdings)
    app.add_middleware(
        BodyLimit,
        max_bytes=config.max_body_bytes,
        timeout_s=config.body_timeout_s,
        admission=context.engine.admission,
    )
    app.add_middleware(ApiKeys, keys=config.api_keys)
    if config.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(config.cors_origins),
            allow_methods=["*"],
            allow_headers=["*"],
            expose_headers=["X-Request-Id", "Retry-After"],
        )
    app.add_middleware(RecordedRequests, recorder=app.state.observability.recorder)
    return app


async def _answer_headrace_error(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HeadraceError)
    return error_response(error)


async def _answer_validation_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    message, param = explain_validation(error.errors())
    if param is None and request.method == "POST" and "json" not in request.headers.get("content-type", ""):
        message = "the body is not declared as JSON; send it with 'Content-Type: application/json'"
    return JSONResponse(error_object(message, "invalid_request_error", param=param), 400)


async def _answer_http_error(request: Request, error: Exception) -> JSONResponse:
    """What routing refuses: paths and methods that are not there."""
    assert isinstance(error, HTTPException)
    message = str(error.detail)
    if error.status_code in (404, 405):
        message = _explain_route(request, error)
    kind = getattr(error, "kind", "invalid_request_error")
    body = error_object(message, kind, code=getattr(error, "code", None))
    return JSONResponse(body, error.status_code, dict(error.headers or {}))


def _explain_route(request: Request, error: HTTPException) -> str:
    """What there is instead of a path, or of its method."""
    path = request.url.path[:200]
    if error.status_code == 405:
        return f"{path} takes {(error.headers or {}).get('Allow', 'another method')}, not {request.method}"
    known = {route.path for router in _ROUTERS for route in router.routes if isinstance(route, APIRoute)}
    close = [f"/v1{path}"] if f"/v1{path}" in known else get_close_matches(path, known, n=1, cutoff=0.85)
    hint = f"did you mean {close[0]}?" if close else "GET /openapi.json lists what there is"
    return f"there is no {request.method} {path} here; {hint}"


async def _answer_unforeseen(request: Request, error: Exception) -> JSONResponse:
    """Sent past all middleware."""
    request_id = request_id_of(request)
    logger.error("request %s met an error that nobody foresaw", request_id, exc_info=error)
    body = error_object("the server failed on this request; its log says why", ServerError.kind)
    return JSONResponse(body, 500, {"X-Request-Id": request_id})
