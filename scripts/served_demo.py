"""`headrace serve` as a process of its own, for what must outlive or survive it."""

import queue
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

START_S = 120.0


@dataclass(frozen=True)
class ServedDemo:
    """url: such as http://127.0.0.1:1234, without a slash at its end."""

    url: str
    process: subprocess.Popen[str]

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    def kill(self) -> None:
        """As the kernel does it: no last word to anybody."""
        self.process.kill()
        self.process.wait()


@contextmanager
def served_demo(*options: str, port: int = 0) -> Iterator[ServedDemo]:
    """The demo model, ready to answer; ended in the end.

    Raises:
        RuntimeError: it is not ready in START_S, with what it said.
    """
    command = [sys.executable, "-m", "headrace", "serve", "--port", str(port), *options]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            yield ServedDemo(_ready_url(process), process)
        finally:
            process.terminate()
            process.wait()


def _ready_url(process: subprocess.Popen[str]) -> str:
    lines: queue.SimpleQueue[str] = queue.SimpleQueue()
    threading.Thread(target=_pass_on, args=(process, lines), daemon=True).start()
    said = []
    while True:
        try:
            line = lines.get(timeout=START_S)
        except queue.Empty:
            raise RuntimeError(f"the server is not ready after {START_S:g} s: {' '.join(said)}") from None
        said.append(line)
        if not line:
            raise RuntimeError(f"the server ended with {process.wait()}: {' '.join(said)}")
        if ready := re.search(r"ready after .*(http://\S+)", line):
            return ready[1]


def _pass_on(process: subprocess.Popen[str], lines: "queue.SimpleQueue[str]") -> None:
    """Reads to the end, so that the server never waits for a reader."""
    assert process.stderr is not None
    for line in process.stderr:
        lines.put(line)
    lines.put("")
