"""Installs this folder into the environment of the Python that runs it, and says how far it has come.

    .venv/bin/python -m scripts.setup_venv '.[test]'

`make` calls it. The standard library is all there is when it runs. What pip, CMake and ninja write goes to
`setup.log` in the environment and is condensed to one line: rewritten in a terminal, else a line now and then; a
failure shows the end of the log. The tools that build the kernels are installed into the environment instead of a new
folder for each build, since ninja compiles again all that another folder's headers went into: so the next extras cost
no compiler's time, and a changed file its own.
"""

from __future__ import annotations

import os
import re
import select
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

ROOT = Path(__file__).resolve().parents[1]
SHOWN_AFTER_FAILURE = 40
"""Lines of the log: pip's own complaint is some ten, and a compiler's stands above it."""

_PATTERNS = (
    (re.compile(r"\s*Collecting (\S+)"), "asking for {0}"),
    (re.compile(r"\s*Downloading (?:\S*/)?([^/\s]+?\.(?:whl|tar\.gz)) \(([\d.]+ [kMG]B)\)"), "downloading {0}, {1}"),
    (re.compile(r"Requirement already satisfied: (\S+)"), "found {0}"),
    (re.compile(r"Installing collected packages: (.+)"), "installing what was downloaded"),
    (re.compile(r"\s*\[(\d+)/(\d+)\] Building"), "compiling the kernels, {0} of {1}"),
    (re.compile(r"\s*\[(\d+)/(\d+)\] Linking"), "linking the kernels"),
)


def stage_of(line: str) -> str | None:
    """What a line of pip or ninja says of the work, in a few words; None if nothing."""
    for pattern, words in _PATTERNS:
        if match := pattern.match(line):
            return words.format(*match.groups())
    return None


class ProgressLine:
    """What is being done, and for how long so far: one line of a terminal, or in a log a line every few seconds."""

    def __init__(self, stream: IO[str], *, every_s: float = 15) -> None:
        self._stream = stream
        self._is_terminal = stream.isatty()
        self._every_s = every_s
        self._started_s = time.monotonic()
        self._shown_s = self._started_s
        self._stage = "starting"

    def tell(self, stage: str | None) -> None:
        """stage: None if it is still the last one."""
        self._stage = stage or self._stage
        now_s = time.monotonic()
        if self._is_terminal:
            self._stream.write(f"\r\x1b[2K{self._line()[: _columns(self._stream) - 1]}")
        elif now_s - self._shown_s >= self._every_s:
            self._shown_s = now_s
            self._stream.write(f"{self._line()}\n")
        self._stream.flush()

    def end(self, stage: str) -> None:
        """Leave a line that stays."""
        self._stage = stage
        self._stream.write(f"\r\x1b[2K{self._line()}\n" if self._is_terminal else f"{self._line()}\n")
        self._stream.flush()

    def _line(self) -> str:
        minutes, seconds = divmod(int(time.monotonic() - self._started_s), 60)
        return f"{minutes}:{seconds:02} {self._stage}"


def _columns(stream: IO[str]) -> int:
    return os.get_terminal_size(stream.fileno()).columns or 80  # a terminal of unknown size says 0


def run_logged(command: Sequence[str], log: IO[str], progress: ProgressLine) -> int:
    """Run a command, with all it writes in the log; returns its exit code."""
    log.write(f"$ {' '.join(command)}\n")
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd=ROOT) as process:
        assert process.stdout is not None
        for line in _lines(process.stdout.fileno()):
            if line is not None:
                print(line, file=log, flush=True)
            progress.tell(stage_of(line or ""))
    return process.returncode


def _lines(pipe: int) -> Iterator[str | None]:
    """Lines as they come, and None for each second without one."""
    rest, is_open = b"", True
    while is_open:
        if not select.select([pipe], [], [], 1)[0]:
            yield None
            continue
        data = os.read(pipe, 1 << 16)
        is_open = bool(data)
        *lines, rest = (rest + data).split(b"\n")
        yield from (line.decode(errors="replace") for line in lines)
    if rest:
        yield rest.decode(errors="replace")


def commands(targets: Sequence[str]) -> Iterator[list[str]]:
    """The commands that install `targets`; each is asked for when those before it are done."""
    pip = [sys.executable, "-m", "pip", "install", "--verbose"]
    build = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["build-system"]
    yield [*pip, *build["requires"]]
    # CMake and ninja, unless this machine has them.
    asked = [sys.executable, "-c", f"import {build['build-backend']} as b; print(*b.get_requires_for_build_editable())"]
    if tools := subprocess.run(asked, stdout=subprocess.PIPE, text=True, check=True, cwd=ROOT).stdout.split():
        yield [*pip, *tools]
    yield [*pip, "--no-build-isolation", *(word for target in targets for word in ("--editable", target))]


def main(targets: Sequence[str]) -> int:
    log_file = Path(sys.prefix) / "setup.log"
    print(f"Setting up {sys.prefix}; compiling the kernels takes some minutes on 2 cores.", file=sys.stderr, flush=True)
    progress = ProgressLine(sys.stderr)
    with log_file.open("w", encoding="utf-8") as log:
        code = next(filter(None, (run_logged(command, log, progress) for command in commands(targets))), 0)
    if code:
        print("", *log_file.read_text("utf-8").splitlines()[-SHOWN_AFTER_FAILURE:], sep="\n", file=sys.stderr)
    progress.end(f"setting up failed; {log_file} has everything" if code else "done")
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
