"""When exchanges on a GPU's stream began and ended, without waiting for any."""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple, Protocol, Self

from headrace.costs.sites import Phase
from headrace.parallel.exchange_counts import Call


class Event(Protocol):
    """What is used of `torch.cuda.Event(enable_timing=True)`: a mark in the order of a stream's work."""

    def record(self) -> None: ...

    def query(self) -> bool: ...

    def synchronize(self) -> None: ...

    def elapsed_time(self, end_event: Self) -> float:
        """Milliseconds from this one to a later one."""
        ...


class TimedCall(NamedTuple):
    """begin_ns: on the clock of the processes (CLOCK_MONOTONIC), to some microseconds; None without an anchor."""

    call: Call
    phase: Phase
    duration_s: float
    begin_ns: int | None


class _Pending(NamedTuple):
    """begin, call: None for the end of a replay."""

    begin: Event | None
    end: Event
    call: Call | None
    phase: Phase
    enqueued_s: float


class _Anchor(NamedTuple):
    event: Event
    host_ns: int


class ExchangeEvents:
    """Marks around the calls of one group, and after each replay of them.

    One thread makes calls; another one may ask for `oldest_s`.
    """

    def __init__(self, make_event: Callable[[], Event], now_s: Callable[[], float] = time.monotonic) -> None:
        self._make_event = make_event
        self._now_s = now_s
        self._pending: deque[_Pending] = deque()
        self._spare: list[Event] = []
        self._num_pauses = 0
        self._anchor: _Anchor | None = None
        self._lock = threading.Lock()

    def begin(self) -> Event | None:
        return None if self._num_pauses else self._record()

    def end(self, begin: Event | None, call: Call, phase: Phase) -> None:
        """begin: what `begin` has returned before the call."""
        if begin is not None:
            self._push(begin, call, phase)

    def mark_replay(self, phase: Phase) -> None:
        if not self._num_pauses:
            self._push(None, None, phase)

    def __len__(self) -> int:
        return len(self._pending)

    def take_finished(self) -> list[TimedCall]:
        """The calls that are over, each once. Replays are dropped: their exchanges have no times of their own."""
        found = []
        with self._lock:
            while self._pending and self._pending[0].end.query():
                pending = self._pending.popleft()
                if pending.begin is not None and pending.call is not None:
                    found.append(self._timed(pending.begin, pending.end, pending.call, pending.phase))
                    self._spare.append(pending.begin)
                self._spare.append(pending.end)
        return found

    def oldest_s(self) -> float:
        """How long the oldest exchange that is not over has been asked for; 0 without one, or while paused."""
        with self._lock:
            if self._num_pauses or not self._pending or self._pending[-1].end.query():
                return 0.0
            oldest = next((pending for pending in self._pending if not pending.end.query()), None)
            return 0.0 if oldest is None else self._now_s() - oldest.enqueued_s

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Within it no event is recorded or asked about: neither is allowed while a graph is captured."""
        with self._lock:
            self._num_pauses += 1
        try:
            yield
        finally:
            with self._lock:
                self._num_pauses -= 1

    def set_anchor(self) -> None:
        """Tie the stream's clock to that of the processes. Waits for the stream."""
        event = self._make_event()
        event.record()
        event.synchronize()
        self._anchor = _Anchor(event, time.monotonic_ns())

    def _record(self) -> Event:
        event = self._spare.pop() if self._spare else self._make_event()
        event.record()
        return event

    def _push(self, begin: Event | None, call: Call | None, phase: Phase) -> None:
        end = self._record()
        with self._lock:
            self._pending.append(_Pending(begin, end, call, phase, self._now_s()))

    def _timed(self, begin: Event, end: Event, call: Call, phase: Phase) -> TimedCall:
        begin_ns = None
        if self._anchor is not None:
            begin_ns = self._anchor.host_ns + int(self._anchor.event.elapsed_time(begin) * 1e6)
        return TimedCall(call, phase, begin.elapsed_time(end) / 1e3, begin_ns)
