"""Threads for what would hold the event loop up, with a limit of what may wait for them."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from headrace.server.errors import Overloaded

T = TypeVar("T")

_RETRY_AFTER_S = 2


class SideThreads:
    """
    what: they do, for those who are refused. max_waiting: jobs beside those that run.
    """

    def __init__(self, what: str, num_threads: int, max_waiting: int) -> None:
        self._what, self._max_jobs = what, num_threads + max_waiting
        self._threads = ThreadPoolExecutor(num_threads, thread_name_prefix=f"headrace-{what.split()[0]}")
        self._num_jobs = 0

    async def run(self, job: Callable[[], T]) -> T:
        """
        Raises:
            Overloaded: too many wait. And whatever the job raises.
        """
        if self._num_jobs >= self._max_jobs:
            reason = f"{self._num_jobs} requests wait for their {self._what}; try again later"
            raise Overloaded(reason, retry_after_s=_RETRY_AFTER_S)
        self._num_jobs += 1
        future = self._threads.submit(job)
        # Counted until it has run, whether or not anybody still waits for it.
        loop = asyncio.get_running_loop()
        future.add_done_callback(lambda _: _call_if_open(loop, self._leave))
        return await asyncio.wrap_future(future)

    def _leave(self) -> None:
        self._num_jobs -= 1


def _call_if_open(loop: asyncio.AbstractEventLoop, call: Callable[[], None]) -> None:
    if not loop.is_closed():
        loop.call_soon_threadsafe(call)
