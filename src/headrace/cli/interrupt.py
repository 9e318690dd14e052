"""Ctrl-C as a wish to stop soon, so that it never cuts an engine step in half."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass
class Interrupt:
    was_requested: bool = False


@contextmanager
def deferred_interrupt() -> Iterator[Interrupt]:
    """While inside, a first Ctrl-C only sets `was_requested`; a second one raises KeyboardInterrupt as usual."""
    interrupt = Interrupt()

    def handle(*_: object) -> None:
        if interrupt.was_requested:
            raise KeyboardInterrupt
        interrupt.was_requested = True

    previous = signal.signal(signal.SIGINT, handle)
    try:
        yield interrupt
    finally:
        signal.signal(signal.SIGINT, previous)
