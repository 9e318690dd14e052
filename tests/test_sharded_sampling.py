"""An engine whose ranks sample from sharded logits, as threads, against one process."""

from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from checkpoints import HAS_NATIVE
from sharded_ranks import sampler_on_device
from thread_group import ThreadGroup, on_ranks, thread_groups
from tiny_model import write_tiny_model

from headrace import LLM
from headrace.config import Dtype, EngineConfig, LoadConfig, ParallelConfig, SamplingParams
from headrace.costs.candidates import candidates_payload_bytes, draws_payload_bytes, row_record
from headrace.costs.sharding import vocabulary_shard_sizes
from headrace.costs.sites import Site
from headrace.engine.decode_step import DecodeStep
from headrace.engine.engine import Engine
from headrace.engine.load_rank import load_rank
from headrace.engine.outputs import RequestOutput
from headrace.engine.plan import StepPlan, StepResult
from headrace.engine.rows import Row
from headrace.engine.step_inputs import StepInputs
from headrace.engine.step_sizes import exact_sizes
from headrace.engine.worker import Worker
from headrace.kernels import KernelChoice, resolve_kernels
from headrace.parallel.group import Group, OneRankGroup
from headrace.parallel.place import Place

PROMPTS = [[5, 9, 200, 31], list(range(40, 140)), [7], [5, 9, 200, 31, 8], [11, 12, 13]]
PARAMS = [
    SamplingParams(temperature=0, max_tokens=12, prompt_logprobs=2),
    SamplingParams(seed=1, max_tokens=12),
    SamplingParams(seed=2, max_tokens=12, top_p=0.9, logprobs=3, prompt_logprobs=0),
    SamplingParams(seed=3, max_tokens=12, top_k=20, min_p=0.02, repetition_penalty=1.2, min_tokens=5, logprobs=0),
    SamplingParams(temperature=0, max_tokens=12, frequency_penalty=1.0, logit_bias={70: 4.0}, n=2, seed=4),
]


class ThreadExecutor:
    """Every rank's worker runs every plan, in a thread of its own; all must find the same."""

    max_in_flight = 1

    def __init__(self, groups: list[ThreadGroup], workers: list[Worker]) -> None:
        self.groups, self.workers = groups, workers

    def submit(self, plan: StepPlan) -> None:
        self._plan = plan

    def collect(self) -> StepResult:
        first, *others = on_ranks(self.groups, lambda group: self.workers[group.rank].execute(self._plan))
        assert all(other == first for other in others)
        return first

    def reset(self) -> None:
        for worker in self.workers:
            worker.reset()


def make_llm(folder, parallel: ParallelConfig) -> tuple[LLM, ThreadExecutor]:
    llm = LLM(str(folder), num_blocks=64, num_threads=1, dtype="float32")
    model = llm.engine.model
    load = LoadConfig(model=str(folder), dtype=Dtype.FLOAT32)
    config = EngineConfig(load=load, parallel=parallel, num_threads=1)
    groups = thread_groups(parallel.tensor_parallel_size)

    def worker(group: ThreadGroup) -> Worker:
        def make_group(name: str, ranks: list[int], kernels: object) -> Group:
            return group if name == "tp" else OneRankGroup(name)

        world = SimpleNamespace(
            place=Place(rank=group.rank, config=parallel),
            num_ranks_on_host=len(groups),
            local_rank=group.rank,
            check=lambda: None,
            fabric=SimpleNamespace(make_group=make_group),
        )
        rank = load_rank(config, folder, world)
        return rank.make_worker(
            num_blocks=64,
            block_size=model.plan.cache.block_size,
            max_model_len=model.plan.max_model_len,
            eos_token_ids=model.eos_token_ids,
            all_agree=bool,
        )

    executor = ThreadExecutor(groups, on_ranks(groups, worker))
    llm.engine = Engine(replace(model, executor=executor))
    return llm, executor


def generate(llm: LLM) -> list[RequestOutput]:
    return llm.generate([{"prompt_token_ids": prompt} for prompt in PROMPTS], PARAMS)


def scores(rows) -> list[tuple[int, int]]:
    return [(token_id, p.rank) for row in rows or () for token_id, p in (row or {}).items()]


def assert_same(found: list[RequestOutput], expected: list[RequestOutput]) -> None:
    for mine, theirs in zip(found, expected, strict=True):
        assert [o.token_ids for o in mine.outputs] == [o.token_ids for o in theirs.outputs]
        assert [o.finish_reason for o in mine.outputs] == [o.finish_reason for o in theirs.outputs]
        assert scores(mine.prompt_logprobs) == scores(theirs.prompt_logprobs)
        for o, p in zip(mine.outputs, theirs.outputs, strict=True):
            assert scores(o.logprobs) == scores(p.logprobs)
            values = [torch.tensor([x.logprob for row in q.logprobs or () for x in row.values()]) for q in (o, p)]
            torch.testing.assert_close(*values, rtol=0, atol=1e-4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def expected(folder) -> list[RequestOutput]:
    return generate(LLM(str(folder), num_blocks=64, num_threads=1, dtype="float32"))


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_ranks_sample_what_one_process_samples(folder, expected, world_size) -> None:
    llm, executor = make_llm(folder, ParallelConfig(tensor_parallel_size=world_size))
    assert_same(generate(llm), expected)
    sites = {row.site for group in executor.groups for row in group.ledger_rows()}
    assert (Site.CANDIDATES in sites) == (world_size > 1)
    assert Site.EMBEDDING not in sites
    assert len({worker.fallback_rows for worker in executor.workers}) == 1


def test_ranks_whose_logits_lie_on_a_device_sample_it_too(folder, expected, monkeypatch) -> None:
    """The CPU stands for the device."""
    monkeypatch.setattr("headrace.engine.worker.ShardedSampler", sampler_on_device)
    llm, executor = make_llm(folder, ParallelConfig(tensor_parallel_size=2))
    assert_same(generate(llm), expected)
    assert len({each.fallback_rows for each in executor.workers}) == 1


def test_literal_variants_sample_what_one_process_samples(folder, expected) -> None:
    parallel = ParallelConfig(tensor_parallel_size=2, gather_logits=True, shard_embedding=True)
    llm, executor = make_llm(folder, parallel)
    assert_same(generate(llm), expected)
    for group in executor.groups:
        counts = Counter()
        for row in group.ledger_rows():
            counts[row.site] += row.count
        # Each pass embeds once; logits are gathered for samples, and for prompts where asked for.
        assert counts[Site.CANDIDATES] == 0
        assert counts[Site.EMBEDDING] > 0
        assert counts[Site.LOGITS] > 0


@pytest.mark.parametrize(
    ("params", "gathers"),
    [
        (SamplingParams(temperature=0, max_tokens=6), False),
        (SamplingParams(seed=1, max_tokens=6, ignore_eos=True), False),
        (SamplingParams(temperature=0, max_tokens=6, prompt_logprobs=1), True),
    ],
)
def test_bytes_of_a_request_are_those_of_its_rows(folder, params, gathers) -> None:
    """One row for each token; whole logits travel for the scores of a prompt alone."""
    llm, executor = make_llm(folder, ParallelConfig(tensor_parallel_size=2))
    (output,) = llm.generate([{"prompt_token_ids": PROMPTS[1]}], params)
    num_tokens = len(output.outputs[0].token_ids)
    vocab_size = llm.engine.model.config.vocab_size
    sizes = vocabulary_shard_sizes(vocab_size, 2)
    record = row_record(params, changes_logits=False, vocab_size=vocab_size, largest_shard=sizes[0])
    expected = num_tokens * (candidates_payload_bytes([record]) + draws_payload_bytes([record]))
    for group, size in zip(executor.groups, sizes, strict=True):
        found = Counter()
        for row in group.ledger_rows():
            found[row.site] += row.payload_bytes
        assert found[Site.CANDIDATES] == expected
        assert found[Site.LOGITS] == (4 * size * (len(PROMPTS[1]) - 1) if gathers else 0)


class Bystander(OneRankGroup):
    """One rank of several whose sums lack the others': nothing but native ops runs, so that steps are recorded."""

    def __init__(self, rank: int, world_size: int) -> None:
        super().__init__("tp")
        self.rank, self.world_size = rank, world_size


NEEDS_NATIVE = pytest.mark.skipif(not HAS_NATIVE, reason="the native module is not built")


@NEEDS_NATIVE
@pytest.mark.parametrize("rank", [0, 1, 3])
def test_the_largest_of_a_shard_is_found_while_it_is_computed(folder, rank) -> None:
    parallel = ParallelConfig(tensor_parallel_size=4)
    world = SimpleNamespace(
        place=Place(rank=rank, config=parallel),
        num_ranks_on_host=4,
        local_rank=rank,
        check=lambda: None,
        fabric=SimpleNamespace(make_group=lambda name, *_: Bystander(rank, 4) if name == "tp" else OneRankGroup(name)),
    )
    config = EngineConfig(load=LoadConfig(model=str(folder)), parallel=parallel, num_threads=1)
    worker = load_rank(config, folder, world).make_worker(
        num_blocks=8, block_size=16, max_model_len=64, eos_token_ids=frozenset(), all_agree=bool
    )
    runner = worker._runner
    for position in range(3):
        rows = [Row([7 * i + position], position, np.array([i], dtype=np.int32)) for i in range(2)]
        logits, largest = runner.logits(runner.run(rows))
        assert logits.shape[1] == vocabulary_shard_sizes(runner.vocab_size, 4)[rank]
        assert largest.token_ids.tolist() == logits.argmax(1).tolist()
        assert largest.logits.tolist() == logits.max(1).values.tolist()
    assert runner.decode_step.obstacle is None


@NEEDS_NATIVE
def test_a_rank_without_tokens_replays_its_steps_too() -> None:
    kernels = resolve_kernels(KernelChoice.CPU)
    hidden_states = torch.ones(2, 8)

    def head(hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states.new_empty(len(hidden_states), 0)

    sizes = exact_sizes()
    inputs = StepInputs(
        max_num_seqs=sizes.largest, block_size=16, max_model_len=64, share=None, device=torch.device("cpu")
    )
    step = DecodeStep(kernels, lambda _: hidden_states, head, inputs, sizes)
    rows = [Row([1], 0, np.array([i], dtype=np.int32)) for i in range(2)]
    for _ in range(3):
        logits, largest = step.logits(step.run(rows))
        assert logits.shape == (2, 0)
        assert largest.logits.tolist() == [-torch.inf] * 2
    assert step.obstacle is None
