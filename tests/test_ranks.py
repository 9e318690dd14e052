"""Ranks of one engine beyond its tokens: what they are sent, what ends them, and what does not."""

import os
import socket
import subprocess
import sys
import threading

import pytest
from checkpoints import BY_NAME
from tiny_model import write_tiny_model

from headrace import LLM, SamplingParams
from headrace.config import EngineConfig, LoadConfig, NormPlacement, ParallelConfig, Transport
from headrace.engine.exchange_check import ExchangeCheck
from headrace.engine.start import resolve_transport
from headrace.errors import ConfigError, EngineStopped, ParallelismError
from headrace.models.source import open_model
from headrace.parallel.channel import Channel, ChannelClosed

GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
PROMPT = {"prompt_token_ids": list(range(5, 25))}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> str:
    return str(write_tiny_model(tmp_path_factory.mktemp("ranks") / "tiny"))


def tokens(llm) -> list[int]:
    [output] = llm.generate(PROMPT, GREEDY)
    return output.outputs[0].token_ids


def test_two_ends_that_both_send_much_do_not_wait_for_each_other():
    """A plan and a result, each larger than a socket holds, once blocked rank 0 and the last stage for ever."""
    ends = [Channel(end) for end in socket.socketpair()]
    message = os.urandom(5_000_000)
    heard = []

    def send_and_receive(end):
        end.send(message)
        heard.append(end.receive() == message)

    threads = [threading.Thread(target=send_and_receive, args=(end,), daemon=True) for end in ends]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert heard == [True, True]
    for end in ends:
        end.close()


def test_messages_arrive_whole_and_in_order_until_the_end():
    near, far = (Channel(end) for end in socket.socketpair())
    sent = [b"", b"a", b"b" * 70_000, b"c"]
    for message in sent:
        near.send(message)
    assert [far.receive() for _ in sent] == sent
    near.close()
    with pytest.raises(ChannelClosed):
        far.receive()
    with pytest.raises(ChannelClosed):
        near.send(b"more")
    far.close()


def run_script(script: str, **how) -> str:
    """What a program of its own prints."""
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, **how)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_ctrl_c_in_a_terminal_is_rank_0s_alone(tiny):
    """A terminal interrupts the whole group of processes; other ranks used to end with it, and the engine with them."""
    script = (
        "import os, signal, time\n"
        "from headrace import LLM, SamplingParams\n"
        f"llm = LLM({tiny!r}, tensor_parallel_size=2, num_threads=1)\n"
        "signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        "os.killpg(0, signal.SIGINT)\n"
        "time.sleep(0.3)\n"
        "[output] = llm.generate({'prompt_token_ids': [5, 6, 7]}, SamplingParams(temperature=0, max_tokens=3))\n"
        "print(len(output.outputs[0].token_ids))\n"
    )
    assert run_script(script, start_new_session=True) == "3"


def test_ranks_import_nothing_from_the_current_folder(tiny, tmp_path):
    """A psutil.py beside the user's data once ran in every rank but 0."""
    (tmp_path / "psutil.py").write_text("raise SystemExit(3)")
    command = [sys.executable, "-P", "-m", "headrace", "generate", "--model", tiny, "--prompt-token-ids", "5,6,7"]
    command += ["--tp", "2", "--threads", "1", "--max-tokens", "3", "--json"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


def test_a_forked_child_ends_nobodys_engine(tiny):
    script = (
        "import os, sys\n"
        "from headrace import LLM, SamplingParams\n"
        f"llm = LLM({tiny!r}, tensor_parallel_size=2, num_threads=1)\n"
        "child = os.fork()\n"
        "if child == 0:\n"
        "    sys.exit(0)\n"
        "os.waitpid(child, 0)\n"
        "[output] = llm.generate({'prompt_token_ids': [5, 6, 7]}, SamplingParams(temperature=0, max_tokens=3))\n"
        "print(len(output.outputs[0].token_ids))\n"
    )
    assert run_script(script) == "3"


def test_a_closed_model_says_so(tiny):
    llm = LLM(tiny, tensor_parallel_size=2, num_threads=1)
    llm.close()
    llm.close()
    with pytest.raises(EngineStopped, match="the model was closed"):
        llm.generate(PROMPT, GREEDY)
    with pytest.raises(EngineStopped, match="the model was closed"):
        llm.engine.model.executor.ledger_rows()


def test_questions_wait_until_nothing_is_in_flight(tiny):
    """An answer was once taken for a step's result, and the result for the answer."""
    with LLM(tiny, pipeline_parallel_size=2, num_threads=1) as llm:
        executor = llm.engine.model.executor
        llm.engine.add_request("one", [5, 6, 7], GREEDY)
        plan = llm.engine._scheduler.schedule()
        executor.submit(plan)
        with pytest.raises(RuntimeError, match="1 plans are in flight"):
            executor.ledger_rows()
        executor.collect()
        assert len(executor.ledger_rows()) == 2


@pytest.mark.parametrize("name", ["opt-350m", "gemma2"])
def test_two_tensors_between_stages_of_every_placement_of_norms(tmp_path, name):
    """A stage that ends with a normalized sum has nothing to add: zeros stood in for it, and were refused."""
    BY_NAME[name].write(tmp_path)
    placement = open_model(tmp_path).config.norm.placement
    assert placement in (NormPlacement.POST, NormPlacement.SANDWICH)
    settings = {"dtype": "float32", "num_threads": 1}
    expected = tokens(LLM(str(tmp_path), **settings))
    with LLM(str(tmp_path), pipeline_parallel_size=2, send_residual=True, **settings) as llm:
        assert tokens(llm) == expected
        assert llm.engine.model.executor.exchange_differences() == []


def test_a_wrong_prediction_is_reported_with_its_place(tiny, caplog, monkeypatch):
    """On rank 0, whose check believes that a step had a token more."""
    events = ExchangeCheck.events
    monkeypatch.setattr(ExchangeCheck, "events", lambda self, phase, n, *rest: events(self, phase, n + 1, *rest))
    with LLM(tiny, tensor_parallel_size=2, num_threads=1) as llm:
        tokens(llm)
        llm.engine.model.executor.worker.check_exchanges()
        found = llm.engine.model.executor.exchange_differences()
    assert all(line.startswith("rank 0: ") for line in found)
    assert any("layers.1.mlp all_reduce direct: payload_bytes" in line for line in found)
    [record] = [r for r in caplog.records if "other bytes than predicted" in r.message]
    assert record.levelname == "ERROR"


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"tensor_parallel_size": 3}, ParallelismError, "does not divide 4 attention heads"),
        ({"pipeline_parallel_size": 3}, ParallelismError, "more than the model's 2 layers; sizes that work: 1 to 2"),
        ({"pipeline_parallel_size": 2, "pipeline_layers": (1, 2)}, ParallelismError, "add up to 3; the model has 2"),
        ({"pipeline_parallel_size": 2, "pipeline_layers": (2,)}, ParallelismError, "one number of at least 1 for each"),
        ({"tensor_parallel_size": 2, "transport": "mpi"}, ParallelismError, "put `mpiexec -n 2` before the command"),
        ({"tensor_parallel_size": 2, "transport": "tcp"}, ConfigError, "transport is 'tcp'"),
        (
            {"tensor_parallel_size": 2, "transport": "gloo", "all_reduce_dtype": "int8"},
            ParallelismError,
            "use shm or mpi",
        ),
        ({"tensor_parallel_size": 0}, ConfigError, "tensor_parallel_size is 0"),
        ({"tensor_parallel_size": 2, "deadline_s": 0.5}, ConfigError, "deadline_s is 0.5"),
    ],
)
def test_layouts_that_cannot_be_are_refused(tiny, settings, error, message):
    with pytest.raises(error, match=message):
        LLM(tiny, **settings)


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, Transport.SHM),
        ({"PMI_RANK": "1", "PMI_SIZE": "2"}, Transport.MPI),
        ({"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "2"}, Transport.MPI),
        ({"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2"}, Transport.MPI),
        ({"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"}, Transport.SHM),
        ({"RANK": "1", "WORLD_SIZE": "2"}, Transport.SHM),
        ({"RANK": "1", "WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "none"}, Transport.GLOO),
    ],
)
def test_auto_becomes_what_joins_the_ranks(monkeypatch, variables, expected):
    """Before anything depends on it: under torchrun the check once predicted what shared memory would send."""
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    config = EngineConfig(load=LoadConfig(model="model"), parallel=ParallelConfig(tensor_parallel_size=2))
    assert resolve_transport(config).parallel.transport is expected


def test_a_transport_that_does_not_join_launched_ranks_is_refused(monkeypatch):
    monkeypatch.setenv("PMI_RANK", "0")
    monkeypatch.setenv("PMI_SIZE", "2")
    parallel = ParallelConfig(tensor_parallel_size=2, transport=Transport.SHM)
    with pytest.raises(ParallelismError, match="mpiexec or srun has started this rank"):
        resolve_transport(EngineConfig(load=LoadConfig(model="model"), parallel=parallel))
