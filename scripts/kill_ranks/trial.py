"""One engine, one rank that is killed or stopped, and what becomes of all the others."""

import json
import os
import queue
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from signal import Signals
from typing import Any

import psutil

from scripts.kill_ranks.shared_memory import left_in_shared_memory, names_in_shared_memory

MOMENTS = ("loading", "idle", "prefill", "decode")

DEATH_S = 5.0
"""What every rank has to end in after one has died."""

MPIEXEC = Path(sys.executable).parent / "mpiexec"

_LOAD_S = 60.0
_IMPORT_S = 10.0
_ROOT = Path(__file__).parents[2]


@dataclass(frozen=True, kw_only=True)
class Trial:
    """moment: what the engine is doing, delay_s after which rank `victim` gets a signal.

    settings: of the engine, see `headrace.LLM`. loads_again: the same program then loads another engine.
    is_launched: mpiexec starts the ranks, and not rank 0 the others.
    """

    settings: dict[str, Any]
    victim: int
    moment: str
    delay_s: float
    signal: Signals = Signals.SIGKILL
    loads_again: bool = False
    is_launched: bool = False

    @property
    def world_size(self) -> int:
        return int(self.settings["tensor_parallel_size"]) * int(self.settings["pipeline_parallel_size"])

    @property
    def limit_s(self) -> float:
        """What every rank has to end in."""
        if self.signal is Signals.SIGKILL:
            return DEATH_S
        # Noticed within the deadline; then the stopped one is killed, and those that load have a moment to end.
        limit_s = float(self.settings["deadline_s"]) + 2.0
        # A launcher's ranks know nothing of each other before each of them has imported torch.
        return limit_s + _IMPORT_S if self.is_launched and self.moment == "loading" else limit_s


@dataclass(kw_only=True)
class Outcome:
    """ended_s: from the signal to the end of every other rank but rank 0. error: what the caller was told, error_s
    after the signal, and later: by a second call. problems: what should not have been, one line each."""

    trial: Trial
    ended_s: float | None = None
    error_s: float | None = None
    error: dict[str, str] = field(default_factory=dict)
    later: dict[str, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


def run_trial(trial: Trial) -> Outcome:
    """Load, signal, watch. Ends whatever it has started."""
    outcome = Outcome(trial=trial)
    with tempfile.TemporaryDirectory() as folder:
        shared_before = names_in_shared_memory()
        caller = Caller(trial, Path(folder))
        try:
            _watch(trial, caller, outcome)
        except _Unexpected as error:
            outcome.problems.append(str(error))
        finally:
            caller.end()
        if left := [entry.name for entry in Path(folder).iterdir()]:
            outcome.problems.append(f"left in the folder for temporary files: {', '.join(left)}")
        if left := left_in_shared_memory(shared_before):
            outcome.problems.append(f"left in shared memory: {', '.join(left)}")
    if "Traceback" in caller.stderr:
        outcome.problems.append(f"a traceback: {caller.stderr[-2000:]}")
    return outcome


class _Unexpected(Exception):
    pass


class Caller:
    """A `caller` process: rank 0 and what it says; or several, and the launcher that has started them."""

    def __init__(self, trial: Trial, temporary: Path) -> None:
        asked = {"settings": trial.settings, "moment": trial.moment, "loads_again": trial.loads_again}
        launcher = [str(MPIEXEC), "-n", str(trial.world_size)] if trial.is_launched else []
        self._process = subprocess.Popen(
            [*launcher, sys.executable, "-m", "scripts.kill_ranks.caller", json.dumps(asked)],
            cwd=_ROOT,
            env=os.environ | {"TMPDIR": str(temporary)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.stderr = ""
        self._other_words: list[str] = []
        self._events: queue.Queue[dict[str, Any]] = queue.Queue()
        self._threads = [threading.Thread(target=read) for read in (self._read_events, self._read_stderr)]
        for thread in self._threads:
            thread.start()
        self._root = psutil.Process(self._process.pid)
        self.rank_0 = self._root
        self.ranks = [self._root]

    def find_ranks(self, world_size: int, *, is_launched: bool) -> None:
        """Rank 0 starts the others in order; a launcher tells each which one it is."""
        if is_launched:
            _wait(lambda: len(self._launched()) == world_size, _LOAD_S, "the ranks have not started")
            self.ranks = [process for _, process in sorted(self._launched().items())]
            self.rank_0 = self.ranks[0]
            return
        _wait(lambda: len(self.rank_0.children()) == world_size - 1, _LOAD_S, "the ranks have not started")
        self.ranks += sorted(self.rank_0.children(), key=lambda process: (process.create_time(), process.pid))

    def _launched(self) -> dict[int, psutil.Process]:
        found = {}
        for process in self._root.children(recursive=True):
            with suppress(psutil.Error, KeyError):
                # A proxy of the launcher's has none.
                found[int(process.environ()["PMI_RANK"])] = process
        return found

    @property
    def processes(self) -> list[psutil.Process]:
        """All that there are now, a launcher and its proxies included."""
        return [self._root, *self._root.children(recursive=True)]

    def hear(self, event: str, timeout_s: float, *, passing: Sequence[str] = ()) -> dict[str, Any]:
        """What the caller says next, which must be this; whatever is in `passing` may come before."""
        said = self.hear_any(timeout_s)
        while said["event"] in passing:
            said = self.hear_any(timeout_s)
        if said["event"] != event:
            raise _Unexpected(f"the caller should have come to '{event}' but said {said}")
        return said

    def hear_any(self, timeout_s: float) -> dict[str, Any]:
        try:
            return self._events.get(timeout=timeout_s)
        except queue.Empty:
            raise _Unexpected(f"the caller has said nothing for {timeout_s:.1f} s") from None

    def go_on(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()

    def words(self) -> str:
        """What people would read, a launcher's words included, once all has ended that could write it."""
        for thread in self._threads:
            thread.join(timeout=DEATH_S)
        return self.stderr + "".join(self._other_words)

    def wait(self, timeout_s: float) -> int:
        try:
            return self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise _Unexpected(f"the caller has not ended in {timeout_s:g} s") from None

    def end(self) -> None:
        """Kill whatever is left."""
        with suppress(psutil.Error):
            self.ranks += self.processes
        for process in self.ranks:
            with suppress(psutil.Error):
                process.kill()
        self._process.wait()
        for thread in self._threads:
            thread.join()
        for stream in (self._process.stdin, self._process.stdout, self._process.stderr):
            assert stream is not None
            with suppress(BrokenPipeError):
                stream.close()

    def _read_events(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("{"):
                self._events.put(json.loads(line))
            else:
                self._other_words.append(line)

    def _read_stderr(self) -> None:
        assert self._process.stderr is not None
        self.stderr = self._process.stderr.read()


def _watch(trial: Trial, caller: Caller, outcome: Outcome) -> None:
    if trial.is_launched:
        _watch_launched(trial, caller, outcome)
    else:
        _watch_started(trial, caller, outcome)


def _watch_launched(trial: Trial, caller: Caller, outcome: Outcome) -> None:
    """Nobody is left, and somebody has said why: a rank, or the launcher, which may end them before one can."""
    _signal(trial, caller)
    signalled_s = time.monotonic()
    others = [process for process in caller.processes if process.pid != caller.ranks[trial.victim].pid]
    _wait(lambda: not any(map(_is_alive, others)), trial.limit_s + 10, "the program is still alive")
    outcome.ended_s = time.monotonic() - signalled_s
    if outcome.ended_s > trial.limit_s:
        outcome.problems.append(f"the program has ended after {outcome.ended_s:.1f} s only")
    if _is_alive(caller.ranks[trial.victim]):
        outcome.problems.append("the rank that was stopped is left behind")
    if caller.wait(DEATH_S) == 0:
        outcome.problems.append("the launcher has ended with exit code 0")
    said = caller.words()
    reasons = rf"rank {trial.victim}\b.*|.*has not met all.*|YOUR APPLICATION TERMINATED.*signal.*"
    if found := re.search(reasons, said):
        outcome.error = {"message": found[0]}
    else:
        outcome.problems.append(f"nobody has said why: {said[-500:]}")


def _signal(trial: Trial, caller: Caller) -> None:
    """Once the moment has come."""
    caller.find_ranks(trial.world_size, is_launched=trial.is_launched)
    if trial.moment != "loading":
        caller.hear("loaded", _LOAD_S, passing=("loading",))
    if trial.moment in ("prefill", "decode"):
        caller.hear("busy", _LOAD_S)
    time.sleep(trial.delay_s)
    caller.ranks[trial.victim].send_signal(trial.signal)


def _watch_started(trial: Trial, caller: Caller, outcome: Outcome) -> None:
    caller.hear("loading", _LOAD_S)
    _signal(trial, caller)
    signalled_s = time.monotonic()
    is_killed_caller = trial.victim == 0 and trial.signal is Signals.SIGKILL
    if trial.moment != "idle" and trial.victim > 0:
        _hear_error(trial, caller, outcome, signalled_s)
    others = caller.ranks if is_killed_caller else caller.ranks[1:]
    _wait(lambda: not any(map(_is_alive, others)), trial.limit_s + 10, "ranks are still alive")
    outcome.ended_s = time.monotonic() - signalled_s
    if outcome.ended_s > trial.limit_s:
        outcome.problems.append(f"the ranks have ended after {outcome.ended_s:.1f} s only")
    if is_killed_caller:
        return
    if trial.victim == 0:
        caller.rank_0.send_signal(Signals.SIGCONT)
    if trial.moment == "idle":
        caller.go_on()
    if not outcome.error:
        _hear_error(trial, caller, outcome, time.monotonic())
    _check_end(trial, caller, outcome)


def _hear_error(trial: Trial, caller: Caller, outcome: Outcome, since_s: float) -> None:
    # A rank that is hit while it loads may have loaded by then.
    said = caller.hear("error", trial.limit_s, passing=("loaded", "busy") if trial.moment == "loading" else ())
    outcome.error, outcome.error_s = said, time.monotonic() - since_s
    _expect(outcome, said, "RankError")


def _check_end(trial: Trial, caller: Caller, outcome: Outcome) -> None:
    said = caller.hear_any(trial.limit_s)
    if said["event"] == "later":
        outcome.later = said
        _expect(outcome, said, "EngineStopped")
        said = caller.hear("left", trial.limit_s)
    elif trial.moment != "loading":
        outcome.problems.append(f"a second call did not fail: {said}")
    if trial.settings["transport"] == "gloo":
        # torch keeps one pipe for all stores that a process will ever have.
        said["descriptors"] = [found for found in said["descriptors"] if "pipe:" not in found]
    for what in ("children", "descriptors"):
        if said[what]:
            outcome.problems.append(f"left in the caller: {what} {said[what]}")
    if trial.loads_again:
        caller.hear("loaded again", _LOAD_S)
    if (code := caller.wait(DEATH_S)) != 0:
        outcome.problems.append(f"the caller has ended with exit code {code}")


def _expect(outcome: Outcome, said: dict[str, Any], kind: str) -> None:
    victim = outcome.trial.victim
    if said["kind"] != kind:
        outcome.problems.append(f"the caller got {said['kind']}, not {kind}: {said['message']}")
    if not re.match(rf"rank {victim}\b", said["message"]):
        outcome.problems.append(f"the error does not name rank {victim}: {said['message']}")


def _is_alive(process: psutil.Process) -> bool:
    """A process that nobody has asked for its exit code yet has ended all the same."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _wait(is_so: Callable[[], bool], timeout_s: float, complaint: str) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not is_so():
        if time.monotonic() > deadline_s:
            raise _Unexpected(f"{complaint} after {timeout_s:g} s")
        time.sleep(0.01)
