"""The engine's own statistics, for whoever asks how often: the engine is asked once a second at most."""

import asyncio
import time

from headrace.engine.engine import Engine
from headrace.engine.metrics import EngineStatistics
from headrace.errors import HeadraceError
from headrace.server.async_engine import AsyncEngine

_MIN_INTERVAL_S = 1.0

_PATIENCE_S = 1.0
"""A step of a long prompt may take longer than anybody would wait for a number."""


class EngineWatch:
    """
    latest: what the engine said last; None before it was there. Counters of an engine that was started again after a
    loss begin anew, which `started_at_s` tells, in seconds since 1970.
    """

    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine
        self._asked_s = float("-inf")
        self._question: asyncio.Task[None] | None = None
        self.latest: EngineStatistics | None = None
        self.started_at_s = time.time()

    async def look(self) -> EngineStatistics | None:
        """The latest statistics, of now if the engine can be asked, within a second or so in any case."""
        if self._question is None and time.monotonic() - self._asked_s >= _MIN_INTERVAL_S:
            self._asked_s = time.monotonic()
            self._question = asyncio.create_task(self._ask())
        if self._question is not None:
            # It goes on if it takes longer than that, for the one who asks next.
            await asyncio.wait((self._question,), timeout=_PATIENCE_S)
        return self.latest

    async def _ask(self) -> None:
        try:
            self.latest = await self._engine.ask(Engine.statistics)
            self.started_at_s = time.time() - self.latest.metrics.uptime_s
        except HeadraceError:
            # It is being started, or was lost: what it said last is still what is known.
            pass
        finally:
            self._question = None
