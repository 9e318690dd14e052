"""Lines for a stream that may block: a pipe that nobody reads, a slow disk. Whoever has a line does not wait for it."""

import logging
import sys
import threading
from queue import Full, Queue
from typing import TextIO

logger = logging.getLogger(__name__)

_MAX_LINES = 10_000
"""That wait; a few megabytes."""

_LAST_WORDS_S = 2.0


class LineWriter:
    """Writes on a thread of its own.

    stream: closed at the end; None is stderr, whatever that is at the time.
    """

    def __init__(self, stream: TextIO | None = None, max_lines: int = _MAX_LINES) -> None:
        self._stream = stream
        self._lines: Queue[str | None] = Queue(max_lines)
        self._has_failed = False
        self._thread = threading.Thread(target=self._run, name="headrace-log", daemon=True)
        self._thread.start()

    def put(self, line: str) -> bool:
        """False if too many lines wait already, and this one is dropped."""
        try:
            self._lines.put_nowait(line)
        except Full:
            return False
        return True

    def close(self) -> None:
        """Write what waits, if that can be done within a moment."""
        try:
            self._lines.put(None, timeout=_LAST_WORDS_S)
        except Full:
            return
        self._thread.join(_LAST_WORDS_S)

    def _run(self) -> None:
        while (line := self._lines.get()) is not None:
            try:
                stream = self._stream or sys.stderr
                stream.write(line + "\n")
                stream.flush()
            except (OSError, ValueError) as error:
                self._report(error)
            finally:
                self._lines.task_done()
        if self._stream is not None:
            self._stream.close()

    def _report(self, error: Exception) -> None:
        """Once: the next line will hardly fare better."""
        if not self._has_failed:
            self._has_failed = True
            logger.error("the access log cannot be written: %s", error)
