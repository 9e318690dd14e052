"""Several ranks of which one runs out of memory in the middle of a step: all go on, and nothing is lost."""

from pathlib import Path

import failing_rank
import pytest
from checkpoints import BY_NAME, random_tokens
from failing_memory import Faults
from layout_cases import CROWDED, LAYOUTS, closing, deep_enough
from sharded_ranks import sampler_on_device
from thread_group import ThreadGroup
from thread_world import thread_llm

from headrace import LLM, RequestOutput, SamplingParams
from headrace.config.settings import parallel_config
from headrace.engine import load_rank, start
from headrace.parallel.world import World

LITERAL = dict.fromkeys(("shard_embedding", "send_residual", "slice_boundary", "gather_logits"), True)
CASES = {
    "tp2": ("llama-gqa", LAYOUTS["tp2"]),
    "tp2-on-device": ("llama-gqa", LAYOUTS["tp2"]),
    "tp4-shared": ("llama-gqa", LAYOUTS["tp4"] | {"kv_sharding": "sequence"}),
    "pp3": ("llama-gqa", LAYOUTS["pp3"]),
    "tp2-pp2": ("qwen3-moe", LAYOUTS["tp2-pp2"]),
    "tp2-pp2-literal": ("opt-350m", LAYOUTS["tp2-pp2"] | LITERAL),
}
PARAMS = [
    SamplingParams(temperature=0, max_tokens=14, ignore_eos=True),
    SamplingParams(temperature=0.9, seed=3, max_tokens=12, ignore_eos=True, logprobs=2),
    SamplingParams(temperature=1.0, min_p=1e-9, seed=4, max_tokens=10, ignore_eos=True),
    SamplingParams(temperature=0, max_tokens=9, ignore_eos=True, prompt_logprobs=1, frequency_penalty=0.5),
    SamplingParams(temperature=1.0, top_p=0.8, seed=5, max_tokens=11, ignore_eos=True, logit_bias={5: 2.0}),
]
PROMPTS = [random_tokens(n, seed=n) for n in (17, 9, 5, 20, 13)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp(name)
            deep_enough(BY_NAME[name]).write(made[name])
        return made[name]

    return folder


def run(llm: LLM) -> list[RequestOutput]:
    return llm.generate([{"prompt_token_ids": prompt} for prompt in PROMPTS], PARAMS)


def logprobs(rows) -> list[float]:
    return [entry.logprob for row in rows or () if row for _, entry in sorted(row.items())]


def assert_same(outputs: list[RequestOutput], expected: list[RequestOutput]) -> None:
    for output, other in zip(outputs, expected, strict=True):
        [mine], [its] = output.outputs, other.outputs
        assert (mine.token_ids, mine.finish_reason, mine.error) == (its.token_ids, its.finish_reason, None)
        # Which rank has which block of a shared context, and so how sums over it round, is another one each time.
        assert logprobs(mine.logprobs) == pytest.approx(logprobs(its.logprobs), abs=1e-4)
        assert logprobs(output.prompt_logprobs) == pytest.approx(logprobs(other.prompt_logprobs), abs=1e-4)


@pytest.mark.parametrize("case", CASES)
def test_nothing_is_lost_wherever_memory_runs_out(folders, monkeypatch, case) -> None:
    name, layout = CASES[case]
    if case == "tp2-on-device":
        monkeypatch.setattr("headrace.engine.worker.ShardedSampler", sampler_on_device)
    settings = CROWDED | layout | {"num_blocks": 40}
    faults = Faults(parallel_config(**settings).world_size, period=101)
    with closing(thread_llm(folders(name), change_kernels=faults.kernels, **settings)) as llm:
        expected = run(llm)
        assert not faults.num_faults
        faults.is_on, faults.step = True, lambda: llm.engine._scheduler._step
        with faults.sparing_reserves(), faults.in_exchanges(ThreadGroup), faults.in_sampling():
            assert_same(run(llm), expected)
        faults.is_on = False

        llm.engine.check_integrity()
        assert_same(run(llm), expected)
        for worker in llm.engine.model.executor.workers:
            assert worker.exchange_differences() == []


def test_and_of_processes(folders, monkeypatch, caplog) -> None:
    folder = folders("llama-gqa")
    monkeypatch.setattr(start, "_RANK_MODULE", failing_rank.__name__)
    monkeypatch.setattr(load_rank, "resolve_kernels", op_by_op(load_rank.resolve_kernels))
    settings = CROWDED | LAYOUTS["tp2"] | {"num_blocks": 40}
    with closing(LLM(str(folder), dtype="float32", num_threads=1, max_model_len=64)) as llm:
        expected = run(llm)
    with closing(LLM(str(folder), dtype="float32", **settings)) as llm:
        assert_same(run(llm), expected)
        assert llm.engine.model.executor.exchange_differences() == []
        monkeypatch.setattr(World, "receive", unexpected)
        llm.generate({"prompt_token_ids": PROMPTS[2]}, PARAMS[0])
        monkeypatch.undo()
    assert caplog.text.count("a step does not fit the memory of") >= 2


def unexpected(_world: World, rank: int) -> bytes:
    raise AssertionError(f"ranks that sample together know of each other, but rank {rank} is asked")


def op_by_op(resolve):
    return lambda *args, **kwargs: Faults(1, 1).kernels(resolve(*args, **kwargs))
