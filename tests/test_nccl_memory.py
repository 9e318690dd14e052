"""What NCCL takes of a GPU by itself: before the cache is sized, and where it finds nothing. On stand-ins."""

import os
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from checkpoints import BY_NAME
from gloo_as_nccl import GlooAsNccl, make_fabrics
from layout_cases import CROWDED, GREEDY, LAYOUTS, PROMPTS, as_prompts, closing
from recorded_kernels import without_recordings
from test_world import make_worlds
from thread_world import thread_llm
from torch._C._distributed_c10d import HashStore

from headrace import LLM, SamplingParams
from headrace.config import ParallelConfig, Transport
from headrace.config.settings import parallel_config
from headrace.engine import load
from headrace.engine.loaded_rank import LoadedRank
from headrace.engine.rank_process import run_rank
from headrace.errors import EngineStopped, RankError
from headrace.parallel.nccl_fabric import NcclFabric

__all__ = ["make_fabrics"]

CUDA_TEXT = (
    "NCCL error in: /pytorch/torch/csrc/distributed/c10d/NCCLUtils.cpp:94, unhandled cuda error (run with "
    "NCCL_DEBUG=INFO for details), NCCL version 2.28.9\nncclUnhandledCudaError: Call to CUDA function failed.\n"
    "Last error:\nFailed to CUDA calloc async 4194304 bytes"
)
REMOTE_TEXT = "NCCL error: remote process exited or there was a network error\nLast error:\nsocketPollConnect refused"


class ProcessGroup:
    """One of gloo, each call of which is told of before it is made."""

    def __init__(self, process_group: Any, on_call: Callable[[str, torch.Tensor], None]) -> None:
        self._process_group, self._on_call = process_group, on_call

    def abort(self) -> None:
        """Hang up, as a process that ends: whoever waits for this rank finds out. gloo's own call leaves it waiting."""
        self._process_group = None

    def __getattr__(self, name: str) -> Any:
        call = getattr(self._process_group, name)
        if name not in ("allreduce", "_allgather_base", "alltoall_base", "send", "recv"):
            return call

        def told(first: Any, *args: Any) -> Any:
            brought = args[0] if name in ("_allgather_base", "alltoall_base") else first[0]
            self._on_call(name, brought)
            return call(first, *args)

        return told


def with_process_groups(monkeypatch, on_call: Callable[[int, str, str, torch.Tensor], None]) -> None:
    """on_call: is given the rank, the group, the operation and what is brought."""
    connect = GlooAsNccl._connect

    def connected(self: GlooAsNccl, name: str, *args: Any) -> Any:
        group = connect(self, name, *args)
        group._process_group = ProcessGroup(
            group._process_group, lambda operation, brought: on_call(self._rank, name, operation, brought)
        )
        return group

    monkeypatch.setattr(GlooAsNccl, "_connect", connected)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama-gqa")
    BY_NAME["llama-gqa"].write(folder)
    return folder


LITERAL = dict.fromkeys(("shard_embedding", "send_residual", "slice_boundary", "gather_logits"), True)
SAMPLED = [
    GREEDY,
    SamplingParams(max_tokens=6, seed=1, logprobs=3, ignore_eos=True),
    SamplingParams(max_tokens=6, seed=2, top_k=10**4, prompt_logprobs=1, ignore_eos=True),
]


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param(LAYOUTS["tp2-pp2"], id="tp2-pp2"),
        pytest.param(LAYOUTS["tp2-pp2"] | LITERAL | {"all_reduce_dtype": "float32"}, id="literal"),
        pytest.param(LAYOUTS["tp4"] | {"kv_sharding": "sequence", "all_reduce_dtype": "bfloat16"}, id="sequence"),
    ],
)
def test_no_step_makes_an_exchange_that_was_not_rehearsed(folder, make_fabrics, monkeypatch, settings) -> None:
    """Of each rank, group, operation and type, sizes between the smallest and the largest before the cache was made."""
    rehearsed: dict[tuple, list[int]] = {}
    later: dict[tuple, list[int]] = {}
    notes = rehearsed

    def note(rank: int, group: str, operation: str, brought: torch.Tensor) -> None:
        notes.setdefault((rank, group, operation, brought.dtype), []).append(brought.nbytes)

    settings = CROWDED | settings
    num_ranks, make_worker = parallel_config(**settings).world_size, LoadedRank.make_worker
    all_loaded = threading.Barrier(num_ranks)

    def make_worker_later(self: LoadedRank, **agreement: Any) -> Any:
        nonlocal notes
        if self.parallel.world_size > 1:
            all_loaded.wait(30)
            notes = later
        return make_worker(self, **agreement)

    monkeypatch.setattr(LoadedRank, "make_worker", make_worker_later)
    with_process_groups(monkeypatch, note)
    how = {"fabrics": make_fabrics(num_ranks), "transport": Transport.NCCL, "change_kernels": without_recordings}
    with closing(thread_llm(folder, dtype="bfloat16", **how, **settings)) as llm:
        llm.generate(as_prompts(PROMPTS), SAMPLED)
        assert [worker.exchange_differences() for worker in llm.engine.model.executor.workers] == [[]] * num_ranks
    assert later.keys() <= rehearsed.keys()
    assert {key[2] for key in later} >= {"allreduce", "_allgather_base"}
    for key, sizes in later.items():
        assert min(rehearsed[key]) <= min(sizes), key
        assert max(sizes) <= max(rehearsed[key]), key


def test_ranks_are_connected_for_all_sizes_when_a_group_is_made(monkeypatch) -> None:
    """NCCL reads its environment while it makes the communicator, which is the second of these calls."""
    found = []

    class Options:
        pass

    class Fake:
        def __init__(self, *_: Any) -> None:
            found.append(dict(os.environ))

        def eager_connect_single_device(self, _: torch.device) -> None:
            found.append(dict(os.environ))
            raise torch.distributed.DistBackendError(CUDA_TEXT)

    Fake.Options = Options
    monkeypatch.setattr(torch._C._distributed_c10d, "ProcessGroupNCCL", Fake, raising=False)
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: True)
    monkeypatch.delenv("NCCL_RUNTIME_CONNECT", raising=False)
    fabric = NcclFabric(HashStore(), 0, 30.0)
    message = r"^rank 0 finds no others over NCCL: Failed to CUDA calloc async 4194304 bytes; NCCL found no memory"
    with pytest.raises(RankError, match=message):
        fabric._make_process_group(HashStore(), 0, 1, torch.device("cuda", 0))
    assert [environ["NCCL_RUNTIME_CONNECT"] for environ in found] == ["0", "0"]
    assert "NCCL_RUNTIME_CONNECT" not in os.environ
    monkeypatch.setenv("NCCL_RUNTIME_CONNECT", "1")
    with pytest.raises(RankError):
        fabric._make_process_group(HashStore(), 0, 1, torch.device("cuda", 0))
    assert [environ["NCCL_RUNTIME_CONNECT"] for environ in found[2:]] == ["1", "1"]


@dataclass
class Failure:
    """An exchange of one rank that NCCL fails, once steps run."""

    rank: int
    group: str
    operation: str
    text: str
    is_on: threading.Event = field(default_factory=threading.Event)

    def on_call(self, rank: int, group: str, operation: str, _: torch.Tensor) -> None:
        if self.is_on.is_set() and (rank, group, operation) == (self.rank, self.group, self.operation):
            raise torch.distributed.DistBackendError(self.text)


NO_MEMORY = "Failed to CUDA calloc async 4194304 bytes; NCCL found no memory beside what the engine holds: lower mem"
FAILURES = [
    pytest.param("tp2", Failure(0, "tp", "allreduce", CUDA_TEXT), NO_MEMORY, id="sum-rank-0"),
    pytest.param("tp2", Failure(1, "tp", "_allgather_base", REMOTE_TEXT), "refused; NCCL_DEBUG=WARN", id="candidates"),
    pytest.param("pp2", Failure(1, "pp", "recv", CUDA_TEXT), NO_MEMORY, id="recv"),
]


@pytest.mark.parametrize(("layout", "failure", "reason"), FAILURES)
def test_a_failed_exchange_ends_all_requests_and_all_ranks(folder, monkeypatch, layout, failure, reason) -> None:
    """Real worlds, executors and ranks, joined by sockets within one process; what carries tensors is a stand-in."""
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: True)
    with_process_groups(monkeypatch, failure.on_call)
    worlds = make_worlds(2, config=ParallelConfig(**LAYOUTS[layout]))
    store, codes = HashStore(), []

    def start(config: Any) -> Any:
        for rank, world in enumerate(worlds):
            world.fabric = GlooAsNccl(store, rank, 30.0)
        threads.append(threading.Thread(target=lambda: codes.append(run_rank(worlds[1], config)), daemon=True))
        threads[0].start()
        return worlds[0]

    threads: list[threading.Thread] = []
    monkeypatch.setattr(load, "start_world", start)
    monkeypatch.setattr(load, "resolve_transport", lambda config: config)
    settings = CROWDED | LAYOUTS[layout] | {"transport": "nccl", "device": "cpu"}
    with closing(LLM(str(folder), dtype="float32", **settings)) as llm:
        expected = [output.outputs[0].token_ids for output in llm.generate(as_prompts(PROMPTS), GREEDY)]
        assert len(expected) == len(PROMPTS)
        failure.is_on.set()
        message = rf"^rank {failure.rank}.* failed: .* of group {failure.group} failed: .*{reason}"
        with pytest.raises(RankError, match=message):
            llm.generate(as_prompts(PROMPTS), GREEDY)
        ended = [update.finished.outputs[0] for update in llm.engine.step()]
        assert [output.finish_reason for output in ended] == ["error"] * len(PROMPTS)
        assert all(re.search(reason, output.error) for output in ended)
        assert not llm.engine.has_unfinished
        with pytest.raises(EngineStopped, match="load the model again"):
            llm.generate(as_prompts(PROMPTS), GREEDY)
    threads[0].join(20)
    assert codes == [1]
    for world in worlds:
        world.close()
