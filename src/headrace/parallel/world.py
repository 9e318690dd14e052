"""All ranks of one engine, as one of them sees the others: where it stands, its lines, and what became of them."""

import os
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress

from headrace.config import ParallelConfig
from headrace.errors import HeadraceError, RankError
from headrace.parallel.channel import Channel, ChannelClosed
from headrace.parallel.fabric import Fabric, NoFabric
from headrace.parallel.place import Place
from headrace.parallel.pulse import Pulse

_GRACE_S = 1.0
"""What a rank has to end in once another one is lost, before it is ended."""

_YES, _NO = b"y", b"n"

_FAREWELL_S = 2.0
"""What ranks have to hang up in after an orderly end was announced."""


class World:
    """Owns this process's lines to the other ranks. Rank 0 has a line to each, the others have one to rank 0.

    control: plans and results. lines: signs of life, see `Pulse`. num_ranks_on_host: this one included, which is the
        local_rank-th of them.
    describe: what is known of how a rank ended, where this process started it.
    on_failure: called once with the failure, after a rank was lost and everybody told; ends what is left.
    """

    def __init__(
        self,
        place: Place,
        fabric: Fabric,
        control: Mapping[int, Channel],
        lines: Mapping[int, Channel],
        *,
        num_ranks_on_host: int,
        local_rank: int,
        describe: Callable[[int], str | None] = lambda _: None,
        on_failure: Callable[[str], None] = lambda _: None,
        on_close: Callable[[], None] = lambda: None,
    ) -> None:
        self.place = place
        self.fabric = fabric
        # In the order of ranks, whatever the order in which they have called.
        self.control = dict(sorted(control.items()))
        self.num_ranks_on_host, self.local_rank = num_ranks_on_host, local_rank
        self._lines = dict(lines)
        self._describe, self._on_failure, self._on_close = describe, on_failure, on_close
        self._failure: str | None = None
        self._lock = threading.Lock()
        self._is_closed = False
        self._pulse = Pulse(lines, place.config.deadline_s, self._lose)
        if lines:
            self._pulse.start()

    @property
    def is_closed(self) -> bool:
        return self._is_closed

    @property
    def failure(self) -> str | None:
        """Why the ranks can no longer work together, once that is so."""
        return self._failure

    @property
    def silence(self) -> tuple[str, float]:
        """The rank that was not heard of for the longest time, and for how many seconds; it is lost at the deadline."""
        rank, seconds = self._pulse.longest_silence()
        return str(Place(rank=rank, config=self.place.config)), seconds

    def send(self, rank: int, message: bytes) -> None:
        """
        Raises:
            RankError: a rank was lost; says which, and why.
        """
        try:
            self.control[rank].send(message)
        except ChannelClosed as error:
            raise self.error(rank, f"cannot be reached by rank {self.place.rank}: {error}") from None

    def receive(self, rank: int) -> bytes:
        """
        Raises:
            RankError: a rank was lost; says which, and why.
        """
        try:
            return self.control[rank].receive()
        except ChannelClosed as error:
            raise self.error(rank, f"cannot be heard by rank {self.place.rank}: {error}") from None

    def all_agree(self, agrees: bool) -> bool:
        """Whether every rank does. Each waits for all, and nothing else may be under way on their lines.

        Raises:
            RankError: a rank was lost; says which, and why.
        """
        if self.place.rank > 0:
            self.send(0, _YES if agrees else _NO)
            return self.receive(0) == _YES
        answers = [self.receive(rank) for rank in self.control]
        agrees = agrees and all(answer == _YES for answer in answers)
        for rank in self.control:
            self.send(rank, _YES if agrees else _NO)
        return agrees

    def error(self, rank: int, reason: str) -> RankError:
        """The first failure that was noticed, which is this one if there was none before.

        A broken line is a consequence of what the pulse learns at the same time: it is given a moment to say so.
        """
        self._pulse.wait_for_loss(timeout_s=1.0)
        self._lose(rank, reason)
        return RankError(self._failure or f"the ranks have been ended: rank {rank} {reason}")

    def check(self) -> None:
        """
        Raises:
            RankError: a rank was lost, and what this one has computed since may be wrong; says which, and why.
        """
        if self._failure is not None:
            raise RankError(self._failure)
        self.fabric.check()

    def fail(self, error: BaseException) -> None:
        """Tell all ranks that this one cannot go on, and why; unless that is because another one was lost."""
        if isinstance(error, RankError):
            self._pulse.wait_for_loss(timeout_s=1.0)
        reason = str(error) if isinstance(error, HeadraceError) else f"{type(error).__name__}: {error}"
        self._lose(self.place.rank, f"failed: {reason}")

    def close(self, farewell: bytes = b"") -> None:
        """An orderly end; whatever has failed has ended before.

        farewell: rank 0's last word to the others, which hang up after it. Signs of life stop before it is said, and
        lines stay open until all have heard it: an end in order must not look like a loss to anybody.
        """
        with self._lock:
            if self._is_closed:
                return
            self._is_closed = True
        self._pulse.stop()
        if farewell and self._failure is None:
            self._say_farewell(farewell)
        self._on_close()
        for channel in (*self.control.values(), *self._lines.values()):
            channel.close()
        self.fabric.close()

    def _say_farewell(self, message: bytes) -> None:
        for channel in self.control.values():
            with suppress(ChannelClosed):
                channel.send(message)
        deadline_s = time.monotonic() + _FAREWELL_S
        for channel in self.control.values():
            channel.wait_for_end(deadline_s - time.monotonic())

    def _lose(self, rank: int, reason: str) -> None:
        with self._lock:
            if self._failure is not None or self._is_closed:
                return
            place = Place(rank=rank, config=self.place.config)
            known = self._describe(rank) if reason == "has gone" else None
            self._failure = f"{place} {known or reason}"
        self._pulse.tell(rank, known or reason)
        self.fabric.abort(self._failure)
        for channel in self.control.values():
            channel.close()
        self._on_failure(self._failure)


def exit_soon(failure: str) -> None:  # noqa: ARG001
    """End this process, which is no use without the others, if it does not end by itself."""
    timer = threading.Timer(_GRACE_S, os._exit, args=(1,))
    timer.daemon = True
    timer.start()


def one_rank_world() -> World:
    place = Place(rank=0, config=ParallelConfig())
    return World(place, NoFabric(), {}, {}, num_ranks_on_host=1, local_rank=0)
