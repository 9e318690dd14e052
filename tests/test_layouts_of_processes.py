"""Layouts whose ranks are processes: started by rank 0 over shared memory, and by launchers over MPI and gloo."""

import json
import os
import socket
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest
from checkpoints import BY_NAME, HAS_NATIVE
from layout_cases import (
    CROWDED,
    FAMILIES,
    GREEDY,
    LAYOUTS,
    ORDER,
    PROMPTS,
    Subject,
    as_prompts,
    assert_crowd,
    closing,
    make_subject,
    tokens_of,
)
from planned_run import assert_ledgers_as_predicted, record_plans

from headrace import LLM
from headrace.config import Transport
from headrace.config.settings import parallel_config
from headrace.costs.exchanges import rules_of

needs_native = pytest.mark.skipif(not HAS_NATIVE, reason="the native module is not built")

MPIEXEC = Path(sys.executable).parent / "mpiexec"
LAUNCHED = Path(__file__).with_name("launched_layouts.py")

LAUNCHERS = [
    pytest.param(
        Transport.MPI,
        marks=[needs_native, pytest.mark.skipif(not MPIEXEC.exists(), reason="no mpiexec beside this Python")],
        id="mpi",
    ),
    pytest.param(Transport.GLOO, id="gloo"),
]


@pytest.fixture(scope="module")
def subjects(tmp_path_factory) -> dict[str, Subject]:
    """Of every family, by recipe."""
    return {recipe.name: make_subject(recipe, tmp_path_factory.mktemp(recipe.name)) for recipe in FAMILIES}


@pytest.mark.timeout(600)
@pytest.mark.parametrize("transport", LAUNCHERS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_family_on_ranks_of_a_launcher(subjects, tmp_path, request, layout, transport):
    names = list(subjects)
    if transport is Transport.GLOO and not request.config.getoption("--all-layouts"):
        # gloo's exchanges take a hundred times as long as MPI's: each family on one of the layouts, then.
        names = names[list(LAYOUTS).index(layout) :: len(LAYOUTS)]
    cases = [{"name": name, "layout": layout, "subject": subjects[name].to_json()} for name in names]
    asked = {"transport": transport.value, "cases": cases, "ports": free_ports(len(cases))}
    file = tmp_path / "asked.json"
    file.write_text(json.dumps(asked))
    num_ranks = parallel_config(**LAYOUTS[layout]).world_size
    launch = mpiexec if transport is Transport.MPI else torchrun
    assert launch(num_ranks, file).split("\n") == [*(f"{name} {layout}" for name in names), ""]


def mpiexec(num_ranks: int, asked: Path) -> str:
    command = [str(MPIEXEC), "-n", str(num_ranks), sys.executable, str(LAUNCHED), str(asked)]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr + done.stdout
    return done.stdout


def torchrun(num_ranks: int, asked: Path) -> str:
    """What torchrun tells the ranks it starts, without what it does when one ends."""
    told = {"TORCHELASTIC_RUN_ID": "layouts", "WORLD_SIZE": str(num_ranks), "MASTER_ADDR": "127.0.0.1"}
    with ExitStack() as stack:
        ranks = [
            stack.enter_context(
                subprocess.Popen(
                    [sys.executable, str(LAUNCHED), str(asked)],
                    env=os.environ | told | {"RANK": str(rank)},
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    text=True,
                )
            )
            for rank in range(num_ranks)
        ]
        said = [rank.communicate(timeout=500)[0] for rank in ranks]
    assert not any(rank.returncode for rank in ranks), "\n".join(said)
    return said[0]


def free_ports(count: int) -> list[int]:
    """Each another one, that nobody listens on."""
    with ExitStack() as stack:
        servers = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [server.getsockname()[1] for server in servers]


PROCESSES = [
    pytest.param("llama-gqa", "tp4", "shm", id="llama-gqa-tp4-shm", marks=needs_native),
    pytest.param("chatglm3", "tp2-pp2", "shm", id="chatglm3-tp2-pp2-shm", marks=needs_native),
    pytest.param("opt-350m", "pp3", "shm", id="opt-350m-pp3-shm", marks=needs_native),
    pytest.param("gemma3", "tp2-pp2", "shm", id="gemma3-tp2-pp2-shm", marks=needs_native),
    pytest.param("mixtral", "pp1-2", "shm", id="mixtral-pp1-2-shm", marks=needs_native),
    pytest.param("qwen3-moe", "tp2", "shm", id="qwen3-moe-tp2-shm", marks=needs_native),
    pytest.param("llama-gqa", "tp2", "gloo", id="llama-gqa-tp2-gloo"),
]


@pytest.mark.parametrize(("name", "layout", "transport"), PROCESSES)
def test_ranks_as_processes(tmp_path, name, layout, transport):
    subject = make_subject(BY_NAME[name], tmp_path)
    settings = subject.settings(layout) | {"transport": transport}
    with closing(LLM(str(tmp_path), dtype="float32", **settings)) as llm:
        assert_crowd(llm, subject, settings, Transport(transport))
        assert llm.engine.model.executor.exchange_differences() == []


@needs_native
def test_long_messages_of_processes(subjects):
    """Above 32 KiB four ranks add up in two shots: 128 tokens of 64 values in float32."""
    llama = subjects["llama"]
    settings = CROWDED | LAYOUTS["tp4"] | {"max_num_batched_tokens": 256, "num_blocks": 64, "max_num_seqs": 8}
    with closing(LLM(str(llama.folder), dtype="float32", **settings)) as llm:
        plans = record_plans(llm)
        outputs = llm.generate(as_prompts(PROMPTS[i] for i in ORDER), GREEDY)
        assert tokens_of(outputs) == [llama.tokens[i] for i in ORDER]
        engine = llm.engine
        ledgers = engine.model.executor.ledger_rows()
        assert {row.algorithm for row in ledgers[0]} == {"direct", "two_shot"}
        rules = rules_of(Transport.SHM)
        assert_ledgers_as_predicted(ledgers, plans, engine.model.config, parallel_config(**settings), rules)
