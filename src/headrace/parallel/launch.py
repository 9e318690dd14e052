"""Starts the other ranks of this host as processes of their own, and ends them."""

import os
import pickle
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import psutil

from headrace.parallel.channel import Channel, channel_pair

_STOPPED = (psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP)
_END_S = 4.0
"""What a rank has to end in by itself, before it is killed."""


@dataclass(frozen=True, kw_only=True)
class Greeting:
    """What a started rank is told first. settings: for whoever runs the rank, see `engine.rank_process`."""

    rank: int
    region_fd: int | None
    store_port: int | None
    settings: Any


class LocalRanks:
    """Processes for ranks 1, 2, ... with two sockets each, inherited, so that nothing has a name others could find.

    Owns the processes. Their standard output is this one's standard error: only rank 0 prints results.
    """

    def __init__(self, module: str) -> None:
        self._module = module
        self._processes: dict[int, subprocess.Popen[bytes]] = {}
        self.control: dict[int, Channel] = {}
        self.lines: dict[int, Channel] = {}

    def start(self, greetings: Sequence[Greeting]) -> None:
        """One process for each greeting.

        Raises:
            OSError: the system has no room for another process; those that were started have ended again.
        """
        try:
            for greeting in greetings:
                self._start(greeting)
        except BaseException:
            self.kill()
            raise

    def describe(self, rank: int) -> str | None:
        """How a rank's process ended, None if it has not."""
        process = self._processes.get(rank)
        if process is None:
            return None
        with suppress(subprocess.TimeoutExpired):
            code = process.wait(timeout=1.0)
            if code < 0:
                return f"was killed by signal {-code} ({signal.Signals(-code).name})"
            return f"ended with exit code {code}"
        return None

    def end(self) -> None:
        """Wait for the processes, which have been told to end, and kill those that do not or that are stopped."""
        deadline_s = time.monotonic() + _END_S
        for process in self._processes.values():
            with suppress(psutil.NoSuchProcess):
                if psutil.Process(process.pid).status() in _STOPPED:
                    process.kill()
        for process in self._processes.values():
            with suppress(subprocess.TimeoutExpired):
                process.wait(timeout=max(0.0, deadline_s - time.monotonic()))
        self.kill()

    def kill(self) -> None:
        """End every process now, a stopped one too."""
        for process in self._processes.values():
            if process.poll() is None:
                process.kill()
        for process in self._processes.values():
            process.wait()

    def _start(self, greeting: Greeting) -> None:
        control, their_control = channel_pair()
        line, their_line = channel_pair()
        with their_control, their_line:
            inherited = [their_control.fileno(), their_line.fileno()]
            if greeting.region_fd is not None:
                inherited.append(greeting.region_fd)
            # -P, and modules from where this process has them: not from whatever folder it was started in.
            command = [sys.executable, "-P", "-m", self._module, str(inherited[0]), str(inherited[1])]
            environ = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
            self._processes[greeting.rank] = subprocess.Popen(
                command,
                pass_fds=inherited,
                stdin=subprocess.DEVNULL,
                stdout=2,
                env=environ,
                process_group=0,  # Ctrl-C in a terminal is rank 0's to handle
            )
        self.control[greeting.rank] = control
        self.lines[greeting.rank] = line
        # Between processes of one user and one program, over a socket that nobody else has: pickle is safe here.
        control.send(pickle.dumps(greeting))


def inherited_channels(argv: Sequence[str]) -> tuple[Channel, Channel]:
    """A started rank's ends of its two sockets, from its command line: control, and the line for signs of life."""
    control, line = (socket.socket(fileno=int(argument)) for argument in argv)
    for stream in (control, line):
        os.set_inheritable(stream.fileno(), False)
    return Channel(control), Channel(line)


def receive_greeting(control: Channel) -> Greeting:
    greeting = pickle.loads(control.receive())
    assert isinstance(greeting, Greeting)
    return greeting
