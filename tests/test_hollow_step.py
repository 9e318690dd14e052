"""What a rank exchanges that has run out of memory, and what it needs for that."""

from typing import Any

import pytest
import torch
from checkpoints import BY_NAME
from gloo_as_nccl import make_fabrics
from layout_cases import CROWDED, LAYOUTS, closing
from thread_world import thread_llm
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from headrace.config import Transport
from headrace.costs.exchanges import Layout, rules_of
from headrace.costs.sites import Phase
from headrace.costs.steps import ForwardPass, SampledRows, WholeRows
from headrace.engine.device_memory import Reserve
from headrace.engine.hollow_step import largest_exchange_bytes

__all__ = ["make_fabrics"]

EVENTS = [WholeRows(Phase.PREFILL, 64), SampledRows(Phase.PREFILL, 2, 16)]


class Allocated(TorchDispatchMode):
    """Bytes of all memory that ops made, whether or not it was let go."""

    def __init__(self) -> None:
        super().__init__()
        self._storages: dict[int, torch.UntypedStorage] = {}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False

    @property
    def num_bytes(self) -> int:
        return sum(storage.nbytes() for storage in self._storages.values())

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, torch.Tensor):
                self._storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return out


LITERAL = dict.fromkeys(("shard_embedding", "send_residual", "slice_boundary", "gather_logits"), True)


class Unwatched:
    """A process group of gloo, which makes copies that NCCL's has no need for."""

    def __init__(self, process_group: Any) -> None:
        self._process_group = process_group

    def __getattr__(self, name: str) -> Any:
        def call(*args: Any) -> Any:
            with _disable_current_modes():
                return getattr(self._process_group, name)(*args)

        return call


@pytest.mark.parametrize(
    ("num_tokens", "settings"),
    [
        pytest.param(10, LAYOUTS["tp2-pp2"], id="rows"),
        pytest.param(400, LAYOUTS["tp2-pp2"] | LITERAL, id="literal"),
        pytest.param(400, LAYOUTS["tp4"] | {"kv_sharding": "sequence"}, id="shared contexts"),
    ],
)
def test_no_exchange_takes_more_than_is_set_aside(tmp_path, make_fabrics, num_tokens, settings) -> None:
    """Of NCCL's own code; what it takes beside torch's memory it has taken when ranks were connected."""
    BY_NAME["llama-gqa"].write(tmp_path)
    how = {"fabrics": make_fabrics(4), "transport": Transport.NCCL}
    with closing(thread_llm(tmp_path, **how, **CROWDED | settings)) as llm:
        executor, model = llm.engine.model.executor, llm.engine.model.config

        for group in (group for worker in executor.workers for group in worker.groups):
            group._process_group = Unwatched(group._process_group)

        def most_bytes(rank: int) -> int:
            found, events = 0, [ForwardPass(Phase.PREFILL, num_tokens), *EVENTS]
            for call in executor.workers[rank]._exchanges.hollow.calls(events):
                with Allocated() as allocated:
                    call()
                found = max(found, allocated.num_bytes)
            return found

        parallel = executor.workers[0]._exchanges.hollow._parallel
        layout = Layout(model=model, parallel=parallel, activation_bytes=4, rules=rules_of(Transport.NCCL))
        for rank, found in enumerate(executor._pool.map(most_bytes, range(4))):
            assert 0 < found <= largest_exchange_bytes(layout, rank, max_num_tokens=num_tokens, max_num_seqs=2)


@pytest.mark.parametrize(("settings", "num_calls"), [({}, (1, 2)), ({"gather_logits": True}, (0, 0))])
def test_a_rank_is_believed_from_its_candidates_on(tmp_path, settings, num_calls) -> None:
    """Draws follow them unseen: who has brought candidates and finds no memory for draws cannot take them back."""
    BY_NAME["llama-gqa"].write(tmp_path)
    with closing(thread_llm(tmp_path, **CROWDED | LAYOUTS["tp2"] | settings)) as llm:
        hollow = llm.engine.model.executor.workers[1]._exchanges.hollow
        forward, plain, drawn = ForwardPass(Phase.DECODE, 1), *(SampledRows(Phase.DECODE, 1, 16, n) for n in (0, 4))
        num_before = len(list(hollow.calls([forward])))
        for sampled, expected in zip((plain, drawn), num_calls, strict=True):
            assert hollow.num_sampling_calls([forward, sampled]) == expected
            if expected:
                assert len(list(hollow.calls([forward, sampled]))) == num_before + expected


class TestReserve:
    def test_what_finds_no_memory_finds_that_which_was_set_aside(self) -> None:
        reserve, free = Reserve(torch.device("cpu"), 1000), []

        def run() -> str:
            free.append(reserve._memory is None)
            if not free[-1]:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return "done"

        for _ in range(2):
            assert reserve.retrying(run) == "done"
            reserve.restore()
        assert free == [False, True] * 2
        assert reserve._memory.nbytes == 1000

    def test_other_errors_leave_it_alone(self) -> None:
        reserve = Reserve(torch.device("cpu"), 1000)
        with pytest.raises(RuntimeError, match="size"):
            reserve.retrying(lambda: torch.zeros(2) @ torch.zeros(3))
        assert reserve._memory is not None
