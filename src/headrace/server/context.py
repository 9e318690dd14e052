"""What every route works with."""

import time
from dataclasses import dataclass, field
from typing import Annotated, Any
from uuid import uuid4

from fastapi import Depends, Request

from headrace.config.server import ServerConfig
from headrace.engine.load import LoadedModel
from headrace.server.async_engine import AsyncEngine
from headrace.server.sampling import recommended_sampling
from headrace.server.side_threads import SideThreads

REQUEST_ID = "headrace.request_id"
"""Where a request's scope keeps its id."""


@dataclass(frozen=True, kw_only=True)
class ServerContext:
    """
    model_name: what clients call the model.
    text_threads: where text becomes tokens, so that the loop never waits; grammar_threads: where forms are compiled, so
        that text does not wait for those either.
    """

    engine: AsyncEngine
    config: ServerConfig
    model_name: str
    created_s: int = field(default_factory=lambda: int(time.time()))
    text_threads: SideThreads = field(default_factory=lambda: SideThreads("text to be read", 2, max_waiting=1024))
    grammar_threads: SideThreads = field(default_factory=lambda: SideThreads("forms to be compiled", 1, max_waiting=64))

    @property
    def model(self) -> LoadedModel:
        """
        Raises:
            Unavailable: there is no engine at the moment.
        """
        return self.engine.engine.model

    @property
    def recommended(self) -> dict[str, Any]:
        """Sampling settings that the model's files recommend."""
        return recommended_sampling(self.model.generation_config)


def _context(request: Request) -> ServerContext:
    context: ServerContext = request.app.state.context
    return context


Context = Annotated[ServerContext, Depends(_context)]


def request_id_of(request: Request) -> str:
    """The id that this request has in logs and headers."""
    return request.scope.setdefault(REQUEST_ID, uuid4().hex)  # type: ignore[no-any-return]
