"""Ranks that are killed, stopped, cut off, starved or that cannot load: nothing hangs, nobody is left, and the caller
is told who was lost and why."""

import gc
import json
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
from checkpoints import HAS_NATIVE
from safetensors.torch import load_file, save_file
from tiny_model import write_tiny_model

from headrace import LLM, SamplingParams
from headrace.demo_model import demo_model_path
from headrace.errors import CheckpointError, EngineStopped, HeadraceError, RankError
from scripts.kill_ranks.__main__ import random_trials
from scripts.kill_ranks.shared_memory import left_in_shared_memory, names_in_shared_memory
from scripts.kill_ranks.trial import DEATH_S, MPIEXEC, Trial, run_trial

pytestmark = pytest.mark.skipif(not HAS_NATIVE, reason="the native module is not built")

DEADLINE_S = 4.0
"""Much more than beats are apart, as the machine may be busy."""
SETTINGS = {
    "model": str(demo_model_path()),
    "tensor_parallel_size": 2,
    "pipeline_parallel_size": 1,
    "transport": "shm",
    "deadline_s": DEADLINE_S,
    "num_threads": 1,
}
SHORT = SamplingParams(temperature=0, max_tokens=3)
ENDLESS = SamplingParams(temperature=0, max_tokens=900, ignore_eos=True)
PROMPT = {"prompt_token_ids": [1, 5, 9]}

STOPS = [
    pytest.param(0, "loading", id="rank-0-loading"),
    pytest.param(0, "decode", id="rank-0-decode"),
    pytest.param(1, "loading", id="rank-1-loading"),
    pytest.param(1, "idle", id="rank-1-idle"),
]


def assert_no_problem(trial: Trial) -> None:
    outcome = run_trial(trial)
    assert not outcome.problems, f"{trial}: {outcome.problems}"


@pytest.mark.parametrize("number", range(5))
def test_random_kills(number):
    """All of it, many more times and with more ranks: `python -m scripts.kill_ranks`."""
    *_, trial = random_trials(SETTINGS, number + 1, stop_share=0, seed=7)
    assert_no_problem(trial)


def test_a_killed_rank_over_gloo_and_another_engine_after_it():
    settings = SETTINGS | {"transport": "gloo"}
    assert_no_problem(Trial(settings=settings, victim=1, moment="decode", delay_s=0.2, loads_again=True))


@pytest.mark.parametrize(("victim", "moment"), STOPS)
def test_a_stopped_rank(victim, moment):
    trial = Trial(settings=SETTINGS, victim=victim, moment=moment, delay_s=0.3, signal=signal.SIGSTOP)
    assert_no_problem(trial)


def test_a_stopped_stage_of_several():
    settings = SETTINGS | {"pipeline_parallel_size": 2, "tensor_parallel_size": 1}
    assert_no_problem(Trial(settings=settings, victim=1, moment="decode", delay_s=0.1, signal=signal.SIGSTOP))


@pytest.mark.skipif(not MPIEXEC.exists(), reason="there is no mpiexec beside this Python")
@pytest.mark.parametrize(
    ("victim", "moment", "how"),
    [
        pytest.param(1, "decode", signal.SIGKILL, id="killed"),
        pytest.param(0, "decode", signal.SIGSTOP, id="rank-0-stopped"),
        pytest.param(1, "loading", signal.SIGSTOP, id="stopped-before-it-has-met-the-others"),
    ],
)
def test_a_lost_rank_of_mpiexec(victim, moment, how):
    """MPI's start waited for a rank that never came, for ever; and what it shares in memory was left behind."""
    trial = Trial(
        settings=SETTINGS | {"transport": "mpi"},
        victim=victim,
        moment=moment,
        delay_s=0.3,
        signal=how,
        is_launched=True,
    )
    assert_no_problem(trial)


NAMED_MEMORY_PROGRAM = """
import mmap, sys, time
with open(sys.argv[1], "wb+") as named:
    named.truncate(mmap.PAGESIZE)
    mapped = mmap.mmap(named.fileno(), mmap.PAGESIZE)
print("mapped", flush=True)
time.sleep(60)
"""


def test_memory_of_another_program_is_not_left_behind():
    """A trial once failed for the name that another MPI program had while it started; a killed one's name is left."""
    before = names_in_shared_memory()
    name = f"headrace_test_{os.getpid()}"
    path = Path("/dev/shm", name)
    command = [sys.executable, "-c", NAMED_MEMORY_PROGRAM, path]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as program:
        try:
            assert program.stdout.readline() == b"mapped\n"
            assert name not in left_in_shared_memory(before)
            program.kill()
            program.wait()
            assert name in left_in_shared_memory(before)
        finally:
            program.kill()
            path.unlink(missing_ok=True)


def channels_of(llm: LLM, what: str) -> dict:
    world = llm.engine.model.executor._world
    return {"control": world.control, "line": world._lines}[what]


@pytest.mark.parametrize("what", ["control", "line"])
@pytest.mark.parametrize("is_idle", [True, False], ids=["idle", "decode"])
def test_a_closed_socket(what, is_idle):
    """The network's end of it: both sides see the connection go, no process has died."""
    llm = LLM(**SETTINGS)
    ranks = psutil.Process().children()
    stream = channels_of(llm, what)[1]._stream
    if is_idle:
        stream.shutdown(socket.SHUT_RDWR)
    else:
        threading.Timer(0.3, stream.shutdown, (socket.SHUT_RDWR,)).start()
    # Each side sees the other one go; the first to say so is believed.
    with pytest.raises(RankError, match=r"^rank (1 |0 cannot be heard by rank 1)"):
        while True:
            llm.generate([PROMPT], SHORT if is_idle else ENDLESS)
    with pytest.raises(EngineStopped, match=r"^rank .* load the model again"):
        llm.generate([PROMPT], SHORT)
    _, alive = psutil.wait_procs(ranks, timeout=DEATH_S)
    assert not alive
    llm.close()


def test_nothing_is_left_in_the_caller():
    """After a loss and after an orderly end: no child, no descriptor, no thread."""

    def state():
        gc.collect()
        return (
            len(psutil.Process().children()),
            len(os.listdir("/proc/self/fd")),  # noqa: PTH208
            {thread.name for thread in threading.enumerate()},
        )

    before = None
    # What earlier tests have left for the garbage collector, and imports, are gone and done after a first round.
    for kill in (False, True, False):
        llm = LLM(**SETTINGS)
        llm.generate([PROMPT], SHORT)
        if kill:
            psutil.Process().children()[0].kill()
            with pytest.raises(RankError, match=r"^rank 1 was killed by signal 9 \(SIGKILL\)$"):
                llm.generate([PROMPT], ENDLESS)
        llm.close()
        del llm
        before = before or state()
        assert state() == before


def misshapen(folder: Path) -> Path:
    """A checkpoint whose second layer, and so its second stage alone, cannot be loaded."""
    write_tiny_model(folder)
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name] = tensors[name][:, :-1].contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_a_rank_that_cannot_load(tmp_path):
    settings = SETTINGS | {"model": str(misshapen(tmp_path)), "pipeline_parallel_size": 2, "tensor_parallel_size": 1}
    with pytest.raises(HeadraceError, match=r"layers\.1\.mlp\.up_proj") as caught:
        LLM(**settings)
    assert isinstance(caught.value, CheckpointError) or str(caught.value).startswith("rank 1 failed: ")
    assert not psutil.Process().children()


def test_a_rank_that_finds_no_memory(tmp_path):
    """Its address space ends where it is while it loads: whatever then fails, the caller hears of rank 1."""

    def starve():
        while not (ranks := psutil.Process().children()):
            time.sleep(0.01)
        ranks[0].rlimit(resource.RLIMIT_AS, (2**28, 2**28))

    thread = threading.Thread(target=starve)
    thread.start()
    try:
        with pytest.raises(RankError, match=r"^rank 1 "):
            LLM(**SETTINGS)
    finally:
        thread.join()
    assert not psutil.Process().children()


FULL_DISK_PROGRAM = """
import json, sys
from headrace import LLM, SamplingParams
from headrace.errors import HeadraceError
settings = json.loads(sys.argv[1])
for break_it in (False, True):
    llm = LLM(**settings)
    out = llm.generate([{"prompt_token_ids": [1, 5, 9]}], SamplingParams(temperature=0, max_tokens=3))
    assert len(out[0].outputs[0].token_ids) == 3
    if break_it:
        llm.engine.model.executor._world.control[1].send(b"p{")
        try:
            while True:
                llm.generate([{"prompt_token_ids": [1, 5, 9]}], SamplingParams(temperature=0, max_tokens=3))
        except HeadraceError as error:
            print(error, flush=True)
    llm.close()
"""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full to play a full disk")
def test_a_full_disk(tmp_path):
    """Ranks write a traceback to standard error, and what they have tuned to the user's cache: neither has room."""
    cache = tmp_path / "cache"
    cache.mkdir()
    is_mounted = (
        shutil.which("mount")
        and not subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=4k,nr_inodes=2", "none", str(cache)], check=False, capture_output=True
        ).returncode
    )
    try:
        if is_mounted:
            (cache / "full").write_bytes(b"x" * 4096)
        with Path("/dev/full").open("w") as full:
            done = subprocess.run(
                [sys.executable, "-c", FULL_DISK_PROGRAM, json.dumps(SETTINGS)],
                env=os.environ | {"XDG_CACHE_HOME": str(cache)},
                stdout=subprocess.PIPE,
                stderr=full,
                text=True,
                check=False,
                timeout=50,
            )
    finally:
        if is_mounted:
            subprocess.run(["umount", str(cache)], check=True)
    assert done.returncode == 0
    assert done.stdout.startswith("rank 1 failed: JSONDecodeError")


def test_four_idle_ranks_use_next_to_no_cpu():
    """Less than 2 % of one core in all: signs of life, and nothing that spins. Time on a core, not on a clock."""
    settings = SETTINGS | {"pipeline_parallel_size": 2, "deadline_s": 30.0}
    with LLM(**settings) as llm:
        llm.generate([PROMPT], SHORT)
        ranks = [psutil.Process(), *psutil.Process().children()]
        assert len(ranks) == 4
        time.sleep(0.5)
        before_s, started_s = cpu_s(ranks), time.monotonic()
        time.sleep(6.0)
        assert cpu_s(ranks) - before_s < 0.02 * (time.monotonic() - started_s)


def cpu_s(processes: list[psutil.Process]) -> float:
    return sum(sum(process.cpu_times()[:2]) for process in processes)
