"""Ranks as forked processes that share memory."""

import os
import pickle
import select
import signal
import traceback
import warnings
from collections.abc import Callable
from typing import Any

from headrace.parallel.native import _native
from headrace.parallel.shm import make_communicator

TIMEOUT_S = 40
RING_BYTES = 16 * 1024
"""Small, so that a test's larger messages take many pieces."""


class RankProcess:
    """A forked rank; what its function returned or raised comes back through a pipe."""

    def __init__(self, function: Callable[[], Any]) -> None:
        self._read_fd, write_fd = os.pipe()
        with warnings.catch_warnings():
            # Threads of torch's, which a child of these tests never meets.
            warnings.filterwarnings("ignore", ".*fork.*", DeprecationWarning)
            self.pid = os.fork()
        if self.pid == 0:
            _report(write_fd, function)
        os.close(write_fd)

    def result(self) -> Any:
        """Waits for the rank's end.

        Raises:
            AssertionError: it raised something, ended without a word, or has not ended in time.
        """
        data = b""
        while select.select([self._read_fd], [], [], TIMEOUT_S)[0]:
            chunk = os.read(self._read_fd, 1 << 20)
            if not chunk:
                break
            data += chunk
        else:
            raise AssertionError("a rank has not ended in time")
        assert data, "a rank ended without a word"
        returned, problem = pickle.loads(data)
        assert problem is None, problem
        return returned

    def signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def end(self) -> None:
        os.close(self._read_fd)
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)


def _report(write_fd: int, function: Callable[[], Any]) -> None:
    returned, problem = None, None
    try:
        returned = function()
    except BaseException:
        problem = traceback.format_exc()
    with os.fdopen(write_fd, "wb") as pipe:
        pickle.dump((returned, problem), pipe)
    os._exit(0)


def start_ranks(
    world_size: int, function: Callable[[_native.Communicator], Any], *, ring_bytes: int = RING_BYTES, pairs=()
) -> list[RankProcess]:
    region = _native.SharedRegion(world_size, ring_bytes, pairs)
    return [RankProcess(lambda rank=rank: function(make_communicator(region, rank))) for rank in range(world_size)]


def run_ranks(world_size: int, function: Callable[[_native.Communicator], Any], **how: Any) -> list[Any]:
    """What each rank's call returned."""
    ranks = start_ranks(world_size, function, **how)
    try:
        return [rank.result() for rank in ranks]
    finally:
        for rank in ranks:
            rank.end()


__all__ = ["RankProcess", "run_ranks", "start_ranks"]
