"""What the server is and whether it works: `/v1/models`, `/version`, `/health`."""

from typing import Any

from fastapi import APIRouter
from starlette.responses import JSONResponse

from headrace import __version__
from headrace.server.clients import error_response
from headrace.server.context import Context, ServerContext
from headrace.server.errors import ModelNotFound, Unavailable
from headrace.server.strict_json import StrictRoute

router = APIRouter(route_class=StrictRoute)

_RETRY_AFTER_S = 5


def check_model(name: str | None, context: ServerContext) -> None:
    """
    Raises:
        ModelNotFound: another model than the one that is served.
    """
    if name is not None and name != context.model_name:
        raise ModelNotFound(f"the model '{name[:200]}' is not served here; this server has '{context.model_name}'")


@router.get("/v1/models")
async def list_models(context: Context) -> dict[str, Any]:
    """The one model that is served."""
    return {"object": "list", "data": [_describe(context)]}


@router.get("/v1/models/{name:path}")
async def show_model(name: str, context: Context) -> dict[str, Any]:
    """The model, if it is this one."""
    check_model(name, context)
    return _describe(context)


@router.get("/version")
async def version() -> dict[str, str]:
    return {"version": __version__}


@router.get("/health")
@router.head("/health", include_in_schema=False)
async def health(context: Context) -> JSONResponse:
    """200 if requests can be answered; 503 with the reason if not: the engine starts or ends, or a rank is lost."""
    trouble = context.engine.trouble
    if trouble is not None:
        return error_response(Unavailable(trouble, retry_after_s=_RETRY_AFTER_S))
    return JSONResponse({"status": "ok"})


def _describe(context: ServerContext) -> dict[str, Any]:
    return {
        "id": context.model_name,
        "object": "model",
        "created": context.created_s,
        "owned_by": "headrace",
        "max_model_len": context.engine.engine.max_num_tokens,
    }
