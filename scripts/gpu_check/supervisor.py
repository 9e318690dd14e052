"""Starts workers, watches over them, and goes on with what is left when one crashes or hangs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scripts.gpu_check.figures import Results, Trouble, trouble_entry
from scripts.gpu_check.units import Unit
from scripts.gpu_check.worker import lines_of

ROOT = Path(__file__).resolve().parents[2]
_POLL_S = 0.1
_GRACE_S = 5.0
_LAST_LINES = 12

Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """folder: for caches; models: for a checkpoint; out: for what was found. deadline_s: of time.time(). command: of a
    worker."""

    folder: Path
    models: Path
    out: Path
    deadline_s: float
    is_dry: bool
    command: tuple[str, ...] = (sys.executable, "-m", "scripts.gpu_check")

    def environment(self) -> dict[str, str]:
        """Of every process: the package from this tree before what PYTHONPATH names (peers that were carried here, for
        example), and caches that this run has for itself."""
        paths = [str(ROOT / "src"), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        # FlashInfer's holds what it has compiled, which takes minutes: one that was carried here is used.
        flashinfer = os.environ.get("FLASHINFER_WORKSPACE_BASE", str(self.folder / "flashinfer"))
        one_thread = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"} if self.is_dry else {}
        return (
            os.environ
            | one_thread
            | {
                "PYTHONPATH": os.pathsep.join(paths),
                "PYTHONUNBUFFERED": "1",
                "XDG_CACHE_HOME": str(self.folder / "cache"),
                "TRITON_CACHE_DIR": str(self.folder / "triton"),
                "TORCHINDUCTOR_CACHE_DIR": str(self.folder / "inductor"),
                "FLASHINFER_WORKSPACE_BASE": flashinfer,
                "TRITON_INTERPRET": "1" if self.is_dry else "0",
                "HEADRACE_KERNELS": "triton",
                "HF_HUB_OFFLINE": "1",
            }
        )


def run_units(
    units: Mapping[str, Unit],
    results: Results,
    settings: Settings,
    say: Say,
    save: Callable[[], None],
) -> None:
    """All of them, in as many workers one after another as it takes."""
    left = list(units)
    number = 0
    while left:
        worker = _Worker(left, settings, settings.out / f"worker-{number}", compiles_only=False)
        number += 1
        num_left = len(left)
        for entry in worker.watch(units, say):
            results.add(entry)
            if entry["kind"] == "done":
                left.remove(entry["unit"])
                save()
        if len(left) == num_left and worker.failed_unit is None:
            # It ended before any unit: another one would, too.
            results.add(trouble_entry(Trouble(unit="worker", message=worker.last_words(), details="")))
            return
        if worker.failed_unit in left:
            left.remove(worker.failed_unit)
            save()


def compile_units(units: Sequence[str], settings: Settings, num_processes: int, limit_s: float, say: Say) -> None:
    """Launch every kernel once in several processes at a time, so that compiled ones are there when times are taken.

    What fails here fails again where it is reported.
    """
    parts = [units[i::num_processes] for i in range(num_processes)]
    start = time.monotonic()
    workers = [
        _Worker(part, settings, settings.out / f"compiler-{i}", compiles_only=True)
        for i, part in enumerate(parts)
        if part
    ]
    while any(worker.is_running for worker in workers) and time.monotonic() - start < limit_s:
        time.sleep(_POLL_S)
    num_late = sum(worker.end() for worker in workers)
    late = f", {num_late} of {len(workers)} processes had not finished" if num_late else ""
    say(f"compiled ahead in {time.monotonic() - start:.0f} s{late}")


def end_group(process: subprocess.Popen[bytes]) -> None:
    """End a process and all that it has started, compilers for example; it leads a group of its own."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


class _Worker:
    """One process. failed_unit: the one in which it ended before its time."""

    def __init__(self, units: Sequence[str], settings: Settings, stem: Path, *, compiles_only: bool) -> None:
        self._file, self._log, self._settings = stem.with_suffix(".jsonl"), stem.with_suffix(".log"), settings
        self._file.unlink(missing_ok=True)
        command = [*settings.command, "--worker", ",".join(units)]
        command += ["--worker-file", str(self._file), "--models", str(settings.models)]
        command += ["--worker-deadline", str(settings.deadline_s)]
        command += ["--dry-run"] * settings.is_dry + ["--compiles-only"] * compiles_only
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                command, cwd=ROOT, env=settings.environment(), stdout=log, stderr=log, process_group=0
            )
        self.failed_unit: str | None = None

    @property
    def is_running(self) -> bool:
        return self._process.poll() is None

    def end(self) -> bool:
        """Whether it was still running."""
        was_running = self.is_running
        end_group(self._process)
        return was_running

    def watch(self, units: Mapping[str, Unit], say: Say) -> Any:
        """Its lines as they come, and one more for a unit that it did not survive."""
        place, unit, since_s = 0, None, time.time()
        try:
            while True:
                is_running = self.is_running
                entries, place = lines_of(self._file, place)
                for entry in entries:
                    if entry["kind"] == "begin":
                        unit, since_s = entry["unit"], time.time()
                        say(f"{unit} ...")
                    elif entry["kind"] == "done":
                        say(f"{unit}: {time.time() - since_s:.1f} s")
                        unit = None
                    elif entry["kind"] == "trouble" and entry["trouble"]["is_failure"]:
                        say(f"  {entry['trouble']['unit']}: {entry['trouble']['message']}")
                    yield entry
                if not is_running:
                    break
                if why := self._overtime(units, unit, since_s):
                    self.end()
                    self.failed_unit = unit
                    yield from self._loss(unit, why, say)
                    return
                time.sleep(_POLL_S)
            self.failed_unit = unit
            if unit is not None:
                yield from self._loss(unit, self.last_words(), say)
        finally:
            self.end()

    def last_words(self) -> str:
        lines = self._log.read_text(errors="replace").splitlines()[-_LAST_LINES:]
        return (
            f"the process ended with {self._process.returncode}: {' | '.join(line for line in lines if line.strip())}"
        )

    def _overtime(self, units: Mapping[str, Unit], unit: str | None, since_s: float) -> str | None:
        now = time.time()
        if now > self._settings.deadline_s + _GRACE_S:
            return "ended, since the time of the whole run was over"
        if unit is not None and now - since_s > units[unit].limit_s:
            return f"ended after {units[unit].limit_s:.0f} s"
        return None

    def _loss(self, unit: str | None, why: str, say: Say) -> Any:
        say(f"  {unit or 'worker'}: {why[:300]}")
        yield trouble_entry(Trouble(unit=unit or "worker", message=why[:300], details=why))
