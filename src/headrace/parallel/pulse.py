"""Signs of life between ranks, on a thread of their own: who falls silent or hangs up is lost, and all ranks learn why.

Rank 0 has a line to each other rank. A process that is killed hangs up at once; one that is stopped, or on a host that
is gone, falls silent. A rank that is merely busy answers: kernels and exchanges run without the interpreter's lock.
"""

import json
import os
import select
import threading
import time
from collections.abc import Callable, Mapping
from operator import itemgetter

from headrace.parallel.channel import Channel, ChannelClosed

OnLost = Callable[[int, str], None]
"""Called once, on the pulse's thread, with the rank that is lost and what happened to it."""

_BEAT = b""
_BEATS_PER_DEADLINE = 5
_MAX_INTERVAL_S = 0.5
"""So that silence is noticed long before the deadline, by those who ask for it."""


class Pulse:
    """Beats on every line, listens on every line.

    deadline_s: silence for so long means that the rank is lost.
    """

    def __init__(self, lines: Mapping[int, Channel], deadline_s: float, on_lost: OnLost) -> None:
        self._lines = dict(lines)
        self._deadline_s = deadline_s
        self._on_lost = on_lost
        self._interval_s = min(deadline_s / _BEATS_PER_DEADLINE, _MAX_INTERVAL_S)
        self._heard_s = dict.fromkeys(self._lines, time.monotonic())
        self._is_stopping = False
        self._has_lost = threading.Event()
        self._wake_read, self._wake_write = os.pipe()
        self._thread = threading.Thread(target=self._run, name="headrace-pulse", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def __del__(self) -> None:
        os.close(self._wake_read)
        os.close(self._wake_write)

    def stop(self) -> None:
        """End the thread without a word: the other side must know that this is an orderly end."""
        self._is_stopping = True
        if self._thread.is_alive() and threading.current_thread() is not self._thread:
            os.write(self._wake_write, b".")
            self._thread.join()

    def wait_for_loss(self, timeout_s: float) -> None:
        """Until a loss has been noticed and dealt with, or for so long."""
        if self._thread.is_alive() and threading.current_thread() is not self._thread:
            self._has_lost.wait(timeout_s)

    def longest_silence(self) -> tuple[int, float]:
        """The rank that was not heard of for the longest time, and for how many seconds. From any thread."""
        rank, heard_s = min(self._heard_s.items(), key=itemgetter(1), default=(0, time.monotonic()))
        return rank, time.monotonic() - heard_s

    def tell(self, rank: int, reason: str) -> None:
        """Say on every line that a rank is lost, and why; those that cannot hear are passed over."""
        message = json.dumps([rank, reason]).encode()
        for line in self._lines.values():
            _send_if_possible(line, message)

    def _run(self) -> None:
        poller = select.poll()
        poller.register(self._wake_read, select.POLLIN)
        rank_of = {}
        for rank, line in self._lines.items():
            poller.register(line.fileno(), select.POLLIN)
            rank_of[line.fileno()] = rank
        next_beat_s = time.monotonic()
        while not self._is_stopping:
            now_s = time.monotonic()
            if now_s >= next_beat_s:
                for line in self._lines.values():
                    _send_if_possible(line, _BEAT)
                next_beat_s = now_s + self._interval_s
            wake_s = min(next_beat_s, min(self._heard_s.values()) + self._deadline_s)
            found = poller.poll(max(0.0, wake_s - now_s) * 1000)
            self._excuse(time.monotonic() - max(wake_s, now_s))
            for descriptor, _ in found:
                if descriptor in rank_of and not self._listen(rank_of[descriptor]):
                    return
            if not self._check_silence():
                return

    def _listen(self, rank: int) -> bool:
        """Take what has come on a line; false if that ends the pulse."""
        try:
            messages = self._lines[rank].receive_ready()
        except ChannelClosed:
            return self._lose(rank, "has gone")
        self._heard_s[rank] = time.monotonic()
        for message in messages:
            if message != _BEAT:
                lost_rank, reason = json.loads(message)
                return self._lose(lost_rank, reason)
        return True

    def _excuse(self, late_s: float) -> None:
        """A rank is silent only while this process is awake to hear it, and not stopped, or busy with an import."""
        if late_s > self._interval_s:
            self._heard_s = {rank: heard_s + late_s for rank, heard_s in self._heard_s.items()}

    def _check_silence(self) -> bool:
        now_s = time.monotonic()
        for rank, heard_s in self._heard_s.items():
            if now_s - heard_s >= self._deadline_s:
                return self._lose(rank, f"has shown no sign of life for {self._deadline_s:g} s")
        return True

    def _lose(self, rank: int, reason: str) -> bool:
        if not self._is_stopping:
            self._is_stopping = True
            self._on_lost(rank, reason)
        self._has_lost.set()
        return False


def _send_if_possible(line: Channel, message: bytes) -> None:
    """A rank that does not read for so long that its buffer is full is told nothing more: it will be found silent."""
    poller = select.poll()
    try:
        poller.register(line.fileno(), select.POLLOUT)
        if poller.poll(0):
            line.send(message)
    except (ChannelClosed, OSError, ValueError):
        pass
