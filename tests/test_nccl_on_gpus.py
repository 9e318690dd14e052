"""Ranks over NCCL on as many GPUs as there are: the same as `test_nccl.py` where no stand-in is needed."""

from datetime import timedelta

import pytest
import torch
from checkpoints import BY_NAME
from layout_cases import CROWDED, GREEDY, LAYOUTS, ORDER, PROMPTS, as_prompts, closing, tokens_of
from planned_run import assert_ledgers_as_predicted, record_plans
from torch._C._distributed_c10d import HashStore

from headrace import LLM
from headrace.config import Transport
from headrace.config.settings import parallel_config
from headrace.costs.exchanges import rules_of
from headrace.costs.sites import Phase
from headrace.errors import RankError
from headrace.parallel.captured import counting_record
from headrace.parallel.nccl_fabric import NcclFabric

NUM_GPUS = torch.cuda.device_count() if torch.cuda.is_available() else 0

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(NUM_GPUS == 0, reason="no GPU"),
    pytest.mark.skipif(not torch.distributed.is_nccl_available(), reason="torch was built without NCCL"),
    pytest.mark.timeout(300),
]


class OneRankFabric(NcclFabric):
    """A group of one rank is NCCL's, too."""

    def make_nccl_group(self, name: str):
        return self._connect(name, [0], torch.device("cuda", 0))


@pytest.fixture
def fabric():
    fabric = OneRankFabric(HashStore(), 0, timedelta(seconds=60).total_seconds())
    yield fabric
    fabric.close()


class TestOneGpu:
    def test_exchanges_with_oneself(self, fabric) -> None:
        tp, kv = fabric.make_nccl_group("tp"), fabric.make_nccl_group("kv")
        x = torch.randn(3, 5, device="cuda")
        assert torch.equal(tp.all_reduce(x.clone(), "sum"), x)
        assert tp.all_reduce(x.clone(), "sum", out_dtype=torch.bfloat16).dtype == torch.bfloat16
        assert torch.equal(tp.all_gather(x, "parts")[0], x)
        assert torch.equal(kv.reduce_scatter(x[None], "rows"), x)
        assert [row.count for row in tp.ledger_rows()] == [2, 1]
        torch.cuda.synchronize()
        assert all(row.transfer_s >= 0 for row in tp.ledger_rows())

    def test_a_graph_holds_exchanges_and_each_replay_counts_them(self, fabric) -> None:
        """No host waits, so that a capture allows them; the watch looks on meanwhile."""
        from headrace.kernels.triton.graphs import GraphRecorder

        group = fabric.make_nccl_group("tp")
        x = torch.randn(4, 8, device="cuda")

        @torch.inference_mode()
        def forward() -> torch.Tensor:
            return torch.stack(group.all_gather(group.all_reduce(x + 1, "sum"), "parts"))[0] * 2

        group.world_size, size = 2, group.world_size  # counted, where with one rank nothing is
        record = counting_record(GraphRecorder(x.device).record, [group])
        group.world_size = size
        group.set_phase(Phase.DECODE)
        out, recording = record(forward)
        assert recording.obstacle is None
        for value in (0.0, 3.0):
            x.fill_(value)
            recording.replay()
            torch.cuda.synchronize()
            assert torch.equal(out, torch.full_like(x, 2 * (value + 1)))
        assert {(row.operation, row.count) for row in group.ledger_rows()} == {("all_reduce", 3), ("all_gather", 3)}

    def test_a_kernel_in_the_way_is_noticed(self, fabric) -> None:
        """Work that stands before an exchange, for longer than any is given."""
        fabric._timeout_s = 1.0
        group = fabric.make_nccl_group("tp")
        torch.cuda._sleep(20 * 10**9)
        group.all_reduce(torch.ones(4, device="cuda"), "sum")
        fabric._watch.join(30)
        with pytest.raises(RankError, match="one of group tp was not over after 1 s"):
            fabric.check()
        torch.cuda.synchronize()


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama-gqa")
    BY_NAME["llama-gqa"].write(folder)
    return folder


@pytest.fixture(scope="module")
def tokens(llama) -> list[list[int]]:
    """Of one process on one GPU, one prompt at a time."""
    llm = LLM(str(llama), dtype="float32", device="cuda", max_model_len=CROWDED["max_model_len"])
    return [tokens_of(llm.generate(as_prompts([prompt]), GREEDY))[0] for prompt in PROMPTS]


@pytest.mark.parametrize("layout", ["tp2", "pp2", "tp4", "tp2-pp2"])
def test_ranks_exchange_what_is_predicted_and_give_the_tokens_of_one(llama, tokens, layout) -> None:
    settings = CROWDED | LAYOUTS[layout]
    num_ranks = parallel_config(**settings).world_size
    if num_ranks > NUM_GPUS:
        pytest.skip(f"{num_ranks} ranks need as many GPUs, and there are {NUM_GPUS}")
    with closing(LLM(str(llama), dtype="float32", device="cuda", **settings)) as llm:
        plans = record_plans(llm)
        outputs = llm.generate(as_prompts(PROMPTS[i] for i in ORDER), GREEDY)
        executor, model = llm.engine.model.executor, llm.engine.model.config
        assert executor.exchange_differences() == []
        assert tokens_of(outputs) == [tokens[i] for i in ORDER]
        if not llm.engine.model.kernels.pads_steps:
            rules = rules_of(Transport.NCCL)
            assert_ledgers_as_predicted(executor.ledger_rows(), plans, model, parallel_config(**settings), rules)
