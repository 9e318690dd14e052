"""Servers under load in a comparison: how each is started, asked whether it is ready, and ended."""

import http.client
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
READY_TIMEOUT_S = 300.0
_END_TIMEOUT_S = 20.0
_POLL_S = 0.01


class TargetFailed(Exception):
    """A server that did not start, or a measurement that gave nothing; says why."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What every target must hold: so many sequences of so many tokens, on so many threads."""

    max_num_seqs: int
    max_model_len: int
    threads: int


@dataclass(frozen=True, kw_only=True)
class ServerTarget:
    """weights: the files that are read before the server is ready."""

    name: str
    format: str
    command: tuple[str, ...]
    weights: tuple[Path, ...]
    is_headrace: bool = False

    def argv(self, port: int) -> list[str]:
        return [*self.command, "--port", str(port)]


def headrace(model: Path, stored_format: str, quantize: str, shape: Shape, options: Sequence[str] = ()) -> ServerTarget:
    return ServerTarget(
        name="Headrace",
        format=stored_format if quantize == "none" else quantize,
        command=(
            *(sys.executable, "-m", "headrace", "serve", "--model", str(model), "--quantize", quantize),
            *("--threads", str(shape.threads), "--max-num-seqs", str(shape.max_num_seqs)),
            *options,
        ),
        weights=tuple(sorted(model.glob("*.safetensors"))),
        is_headrace=True,
    )


def llama_server(binary: Path, gguf: Path, shape: Shape, options: Sequence[str] = ()) -> ServerTarget:
    """Continuous batching is its default. Its cache of earlier prompts is off: every prompt is new, so that it could
    only cost time."""
    return ServerTarget(
        name="llama.cpp",
        format="q4_0",
        command=(
            *(str(binary), "--model", str(gguf), "--host", "127.0.0.1", "--cont-batching"),
            *("--threads", str(shape.threads), "--threads-batch", str(shape.threads)),
            *("--parallel", str(shape.max_num_seqs), "--ctx-size", str(shape.max_num_seqs * shape.max_model_len)),
            *("--cache-ram", "0"),
            *options,
        ),
        weights=(gguf,),
    )


@dataclass(frozen=True)
class RunningServer:
    url: str
    ready_s: float
    """From the start of the process to the first 200 of /health."""


@contextmanager
def running(target: ServerTarget, log: Path, prefix: Sequence[str] = ()) -> Iterator[RunningServer]:
    """
    Raises:
        TargetFailed: it ended, or was not ready in time.
    """
    port = _free_port()
    start_s = time.perf_counter()
    with log.open("ab") as output:
        process = subprocess.Popen(
            [*prefix, *target.argv(port)], cwd=ROOT, stdout=output, stderr=output, start_new_session=True
        )
    try:
        _wait_until_ready(process, port, target, log)
        yield RunningServer(f"http://127.0.0.1:{port}", time.perf_counter() - start_s)
    finally:
        _end(process)


def read_weights_s(files: Sequence[Path]) -> float:
    """Seconds to read the files once, one after the other, as a server must at least."""
    buffer = memoryview(bytearray(16 << 20))
    start_s = time.perf_counter()
    for file in files:
        with file.open("rb", buffering=0) as opened:
            while opened.readinto(buffer):
                pass
    return time.perf_counter() - start_s


def _wait_until_ready(process: subprocess.Popen[bytes], port: int, target: ServerTarget, log: Path) -> None:
    until_s = time.perf_counter() + READY_TIMEOUT_S
    while time.perf_counter() < until_s:
        if process.poll() is not None:
            lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
            raise TargetFailed(f"{target.name} ended with {process.returncode}: {lines[-1] if lines else 'no word'}")
        if _is_ready(port):
            return
        time.sleep(_POLL_S)
    raise TargetFailed(f"{target.name} was not ready after {READY_TIMEOUT_S:.0f} s; see {log}")


def _is_ready(port: int) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=2.0)
    with suppress(OSError, http.client.HTTPException):
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    connection.close()
    return False


def _end(process: subprocess.Popen[bytes]) -> None:
    """Asked first, and killed with all that it has started if it does not."""
    process.terminate()
    try:
        process.wait(_END_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
