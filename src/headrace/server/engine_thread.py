"""The thread that an engine lives on: commands between steps, updates after them, and a new engine for a lost one."""

import gc
import logging
import threading
import time
from collections.abc import Callable, Sequence
from enum import Enum
from queue import Empty, SimpleQueue
from typing import Protocol

from headrace.engine.engine import Engine
from headrace.engine.outputs import RequestUpdate
from headrace.errors import HeadraceError, RankError
from headrace.server.restarts import RestartPolicy

logger = logging.getLogger(__name__)

_LOOK_S = 0.5
"""How often an idle engine looks whether its ranks are there."""


class EngineState(Enum):
    STARTING = "starting"
    READY = "ready"
    RECOVERING = "recovering"
    """Its ranks were lost, and are being started again."""
    FAILED = "failed"
    """It will not come back."""


class Listener(Protocol):
    """Told on the engine's thread, where it must not block, or on the loop."""

    def on_ready(self, engine: Engine) -> None: ...

    def on_updates(self, updates: Sequence[RequestUpdate]) -> None: ...

    def on_lost(self, reason: str, delay_s: float) -> None:
        """All requests are gone; a new engine is started after delay_s."""
        ...

    def on_failed(self, error: BaseException) -> None:
        """There is no engine, and there will be none."""
        ...


Command = Callable[[Engine], None]


class EngineThread:
    """
    load: makes an engine; called on this thread, again after every loss that `restarts` allows for.
    """

    def __init__(self, load: Callable[[], Engine], restarts: RestartPolicy) -> None:
        self._load, self._restarts = load, restarts
        self._commands: SimpleQueue[Command | None] = SimpleQueue()
        self._is_stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="headrace-engine", daemon=True)
        self.step_began_s: float | None = None
        """When the step that is running began; for others to see whether it ends."""

    def start(self, listener: Listener) -> None:
        self._listener = listener
        self._thread.start()

    def do(self, command: Command) -> None:
        """Run a command between two steps. What it raises is logged."""
        self._commands.put(command)

    def stop(self, timeout_s: float) -> bool:
        """End after the step that is running, and close the engine; unfinished requests get no more updates.

        Returns whether the thread has ended by then.
        """
        self._is_stopping.set()
        self._commands.put(None)
        if self._thread.is_alive():
            self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        try:
            while not self._is_stopping.is_set():
                if not self._live_once():
                    return
        except BaseException as error:
            logger.exception("the engine's thread has ended")
            self._listener.on_failed(error)

    def _live_once(self) -> bool:
        """One engine from its start to its end; false if that was the last one."""
        engine, delay_s = None, None
        try:
            engine = self._load()
            self._listener.on_ready(engine)
            self._serve(engine)
        except Exception as error:
            delay_s = self._report(error, was_ready=engine is not None)
        finally:
            if engine is not None:
                engine.close()
            del engine
        if delay_s is not None:
            # Weights of the old engine must be gone before those of a new one come.
            gc.collect()
        return delay_s is not None and not self._is_stopping.wait(delay_s)

    def _report(self, error: Exception, *, was_ready: bool) -> float | None:
        """Say that the engine is lost; seconds until the next one is started, None if that was the last one."""
        if not isinstance(error, HeadraceError):
            logger.error("the engine was lost", exc_info=error)
        has_restarted = self._restarts.num_restarts > 0
        delay_s = self._restarts.next_delay_s(time.monotonic()) if was_ready or has_restarted else None
        if delay_s is None:
            self._listener.on_failed(error)
        else:
            self._listener.on_lost(str(error), delay_s)
        return delay_s

    def _serve(self, engine: Engine) -> None:
        """Until told to stop.

        Raises:
            RankError: other ranks were lost.
        """
        while not self._is_stopping.is_set():
            self._run_commands(engine)
            if engine.has_unfinished:
                self._step(engine)
            self._check(engine)

    def _run_commands(self, engine: Engine) -> None:
        """Those that wait; an idle engine sleeps until there are any."""
        try:
            command = self._commands.get(block=not engine.has_unfinished, timeout=_LOOK_S)
            while command is not None:
                self._run_command(command, engine)
                command = self._commands.get_nowait()
        except Empty:
            pass

    def _run_command(self, command: Command, engine: Engine) -> None:
        try:
            command(engine)
        except Exception:
            logger.exception("a command to the engine failed")

    def _step(self, engine: Engine) -> None:
        self.step_began_s = time.monotonic()
        try:
            updates = engine.step()
        except Exception:
            if engine.failure is not None:
                raise
            # All requests have failed with it, which the next step says; the engine itself goes on.
            logger.exception("a step failed, and all requests with it")
            updates = engine.step()
        finally:
            self.step_began_s = None
        if updates:
            self._listener.on_updates(updates)

    def _check(self, engine: Engine) -> None:
        if engine.failure is not None:
            raise RankError(engine.failure)
