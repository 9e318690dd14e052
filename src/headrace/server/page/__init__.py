"""The page at ``/``: a chat, and beside it the engine's figures as they are now.

Plain HTML, CSS and JavaScript modules, served as they lie in this folder: nothing is built, and nothing is loaded from
anywhere else, so that the page works without a network. It speaks to the server through the public API and ``/stats``
alone.
"""

import hashlib
from dataclasses import dataclass
from functools import partial
from importlib.resources import files

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

__all__ = ["CONTENT_SECURITY_POLICY", "page_routes"]

CONTENT_SECURITY_POLICY = "; ".join(
    (
        "default-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "object-src 'none'",
        "require-trusted-types-for 'script'",  # a browser that knows it refuses innerHTML, whatever the text is
        "trusted-types 'none'",
    )
)

_HEADERS = {
    "cache-control": "no-cache",  # ask each time, and load again only what an upgrade changed
    "content-security-policy": CONTENT_SECURITY_POLICY,
    "cross-origin-opener-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}

_CONTENT_TYPES = {  # of our own: what the system's registry says of .js differs between machines
    ".css": "text/css; charset=utf-8",
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}


@dataclass(frozen=True)
class _Asset:
    """A file of the page, held in memory: all of them together are some ten kilobytes."""

    body: bytes
    content_type: str

    @property
    def etag(self) -> str:
        return f'"{hashlib.sha256(self.body).hexdigest()[:32]}"'


def page_routes() -> list[BaseRoute]:
    """``GET /`` and the files that it names, below ``/page/``; they need no API key, and are in no OpenAPI document."""
    assets = _load_assets()
    index = assets.pop("index.html")
    return [
        Route("/", partial(_answer, index, _HEADERS | {"etag": index.etag}), methods=["GET"]),
        *(
            Route(f"/page/{name}", partial(_answer, asset, _HEADERS | {"etag": asset.etag}), methods=["GET"])
            for name, asset in assets.items()
        ),
    ]


def _load_assets() -> dict[str, _Asset]:
    assets = {}
    for file in files(__name__).iterdir():
        content_type = _CONTENT_TYPES.get("." + file.name.rpartition(".")[2])
        if content_type is not None:
            assets[file.name] = _Asset(file.read_bytes(), content_type)
    return assets


async def _answer(asset: _Asset, headers: dict[str, str], request: Request) -> Response:
    known = {tag.strip().removeprefix("W/") for tag in request.headers.get("if-none-match", "").split(",")}
    if headers["etag"] in known or "*" in known:
        return Response(status_code=304, headers=headers)
    return Response(asset.body, media_type=asset.content_type, headers=headers)
