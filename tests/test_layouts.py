"""Every family on every layout: the tokens of one process, and bytes as predicted on every rank.

Ranks are threads where the arithmetic of shards and stages is in question, and processes where what joins them is.
"""

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from checkpoints import BY_NAME, HAS_NATIVE, RECIPES, Recipe, random_tokens
from planned_run import assert_ledgers_as_predicted, record_plans
from thread_world import thread_llm

from headrace import LLM, RequestOutput, SamplingParams, quantize
from headrace.config import ParallelConfig, Transport
from headrace.costs.exchanges import rules_of
from headrace.engine.llm import _engine_config

NUM_TOKENS = 24
SHARED_PREFIX = random_tokens(24, seed=1)
PROMPTS = (
    SHARED_PREFIX + random_tokens(9, seed=2),
    random_tokens(23, seed=3),
    SHARED_PREFIX + random_tokens(5, seed=4),
)
ORDER = (0, 1, 2, 0, 2, 1, 1)
GREEDY = SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS, ignore_eos=True)
MAX_MODEL_LEN = 64
CROWDED = {
    "max_model_len": MAX_MODEL_LEN,
    "block_size": 8,
    "num_blocks": 14,
    "max_num_batched_tokens": 12,
    "max_num_seqs": 4,
    "num_threads": 1,
}
"""Prompts come in chunks beside sequences that decode, share prefixes, and have too few blocks for all."""

LAYOUTS: dict[str, dict[str, Any]] = {
    "tp2": {"tensor_parallel_size": 2},
    "tp4": {"tensor_parallel_size": 4},
    "pp2": {"pipeline_parallel_size": 2},
    "pp1-2": {"pipeline_parallel_size": 2, "pipeline_layers": (1, 2)},
    "pp3": {"pipeline_parallel_size": 3},
    "tp2-pp2": {"tensor_parallel_size": 2, "pipeline_parallel_size": 2},
}

RICHEST_LAYOUTS = ("tp4", "pp3", "tp2-pp2")
"""For a family's second recipe and those after it."""


def deep_enough(recipe: Recipe) -> Recipe:
    """The recipe with three layers, one for each stage, if it has fewer."""
    if recipe.settings["num_hidden_layers"] >= 3:
        return recipe
    finish = recipe.finish
    if isinstance(finish, partial) and "num_hidden_layers" in finish.keywords:
        finish = partial(finish.func, **finish.keywords | {"num_hidden_layers": 3})
    return replace(recipe, settings=recipe.settings | {"num_hidden_layers": 3}, finish=finish)


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A checkpoint of three layers or more, and the tokens of each prompt by itself in one process."""

    folder: Path
    tokens: list[list[int]]
    num_layers: int


def make_subject(recipe: Recipe, folder: Path) -> Subject:
    deep_enough(recipe).write(folder)
    llm = LLM(str(folder), dtype="float32", num_threads=1, max_model_len=MAX_MODEL_LEN)
    tokens = [tokens_of(llm.generate(as_prompts([prompt]), GREEDY))[0] for prompt in PROMPTS]
    return Subject(folder=folder, tokens=tokens, num_layers=llm.engine.model.config.num_hidden_layers)


@pytest.fixture(scope="module")
def subject(request, tmp_path_factory) -> Subject:
    return make_subject(BY_NAME[request.param], tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Subject:
    return make_subject(BY_NAME["llama-gqa"], tmp_path_factory.mktemp("llama-gqa"))


def as_prompts(token_lists) -> list[dict[str, Any]]:
    return [{"prompt_token_ids": tokens} for tokens in token_lists]


def tokens_of(outputs: list[RequestOutput]) -> list[list[int]]:
    return [output.outputs[0].token_ids for output in outputs]


@contextmanager
def closing(llm: LLM) -> Iterator[LLM]:
    try:
        yield llm
    finally:
        llm.close()


def parallel_config(settings: dict[str, Any]) -> ParallelConfig:
    fields = ParallelConfig.__dataclass_fields__
    return _engine_config(None, {k: v for k, v in settings.items() if k in fields}).parallel


def assert_crowd(llm: LLM, subject: Subject, settings: dict[str, Any], transport: Transport) -> None:
    """All that can happen to a request happens, tokens are those of one process, bytes those predicted."""
    plans = record_plans(llm)
    outputs = llm.generate(as_prompts(PROMPTS[i] for i in ORDER), GREEDY)
    assert tokens_of(outputs) == [subject.tokens[i] for i in ORDER]
    assert any(output.metrics.num_cached_tokens > 0 for output in outputs), "no prefix was shared"
    assert llm.engine.metrics().num_preemptions > 0
    assert any(0 < plan.num_decode_tokens < plan.num_tokens for plan in plans), "no step had prompts beside outputs"
    llm.engine.check_integrity()
    executor, model = llm.engine.model.executor, llm.engine.model.config
    assert_ledgers_as_predicted(executor.ledger_rows(), plans, model, parallel_config(settings), rules_of(transport))


def is_first_of_its_family(recipe_name: str) -> bool:
    recipe = BY_NAME[recipe_name]
    return recipe is next(other for other in RECIPES if other.architecture == recipe.architecture)


CASES = [
    (recipe.name, layout)
    for recipe in RECIPES
    for layout in (LAYOUTS if is_first_of_its_family(recipe.name) else RICHEST_LAYOUTS)
]


@pytest.mark.parametrize(("subject", "layout"), CASES, indirect=["subject"])
def test_every_family_on_every_layout(subject, layout):
    settings = CROWDED | LAYOUTS[layout]
    if "pipeline_layers" in settings:
        settings["pipeline_layers"] = (1, subject.num_layers - 1)
    with closing(thread_llm(subject.folder, **settings)) as llm:
        # Ranks in threads bring whole tensors to every sum, as gloo's do.
        assert_crowd(llm, subject, settings, Transport.GLOO)


FLAGS = ("shard_embedding", "send_residual", "slice_boundary", "gather_logits")
TP2_PP2 = LAYOUTS["tp2-pp2"]


@pytest.mark.parametrize("flags", [*((flag,) for flag in FLAGS), FLAGS], ids="+".join)
@pytest.mark.parametrize("layout", ["tp4", "tp2-pp2"])
def test_literal_behaviour_gives_the_same_tokens(llama, layout, flags):
    settings = CROWDED | LAYOUTS[layout] | dict.fromkeys(flags, True)
    with closing(thread_llm(llama.folder, **settings)) as llm:
        assert_crowd(llm, llama, settings, Transport.GLOO)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("sums", ["auto", "float32", "bfloat16"])
def test_bytes_of_sums_in_another_type(llama, dtype, sums):
    """Tokens may differ from those of one process where sums are rounded, and are equal where they are not."""
    settings = CROWDED | TP2_PP2 | {"all_reduce_dtype": sums}
    with closing(thread_llm(llama.folder, dtype=dtype, **settings)) as llm:
        plans = record_plans(llm)
        tokens = tokens_of(llm.generate(as_prompts(PROMPTS), GREEDY))
        assert {len(row) for row in tokens} == {NUM_TOKENS}
        if dtype == "float32" and sums != "bfloat16":
            assert tokens == llama.tokens
        engine = llm.engine
        assert_ledgers_as_predicted(
            engine.model.executor.ledger_rows(),
            plans,
            engine.model.config,
            parallel_config(settings),
            rules_of(Transport.GLOO),
            activation_bytes=4 if dtype == "float32" else 2,
        )


SAMPLED = [
    SamplingParams(seed=1, max_tokens=NUM_TOKENS, ignore_eos=True),
    SamplingParams(seed=2, temperature=0.7, max_tokens=NUM_TOKENS, top_p=0.9, prompt_logprobs=1, ignore_eos=True),
    SamplingParams(seed=3, max_tokens=NUM_TOKENS, top_k=20, min_p=0.02, repetition_penalty=1.2, min_tokens=5),
    SamplingParams(temperature=0, max_tokens=NUM_TOKENS, frequency_penalty=1.0, logit_bias={70: 4.0}, n=2, seed=4),
    SamplingParams(temperature=0, max_tokens=NUM_TOKENS, logprobs=3, ignore_eos=True),
]


def sampled(llm: LLM) -> list[list[Any]]:
    """Tokens and the ids of whatever was scored beside them."""
    prompts = as_prompts([PROMPTS[0], PROMPTS[1], PROMPTS[2], PROMPTS[1], PROMPTS[0]])
    outputs = llm.generate(prompts, SAMPLED)
    return [
        [[o.token_ids, o.finish_reason, scored(o.logprobs)] for o in output.outputs] + [scored(output.prompt_logprobs)]
        for output in outputs
    ]


def scored(rows) -> list[list[int]]:
    return [sorted(row or ()) for row in rows or ()]


@pytest.mark.parametrize("literal", [False, True], ids=["candidates", "whole-logits"])
@pytest.mark.parametrize("layout", ["tp2", "tp4", "pp3", "tp2-pp2"])
def test_sampled_requests_give_the_tokens_of_one_process(llama, layout, literal):
    settings = CROWDED | LAYOUTS[layout] | {"gather_logits": literal}
    expected = sampled(LLM(str(llama.folder), dtype="float32", num_threads=1, max_model_len=MAX_MODEL_LEN))
    with closing(thread_llm(llama.folder, **settings)) as llm:
        plans = record_plans(llm)
        assert sampled(llm) == expected
        engine = llm.engine
        assert {worker.fallback_rows for worker in engine.model.executor.workers} == {0}
        assert_ledgers_as_predicted(
            engine.model.executor.ledger_rows(),
            plans,
            engine.model.config,
            parallel_config(settings),
            rules_of(Transport.GLOO),
        )


@pytest.mark.parametrize("is_stored", [False, True], ids=["on-load", "stored"])
@pytest.mark.parametrize("quantized", ["int8", "int4"])
@pytest.mark.parametrize("layout", ["tp2", "pp3", "tp2-pp2"])
def test_ranks_have_the_integers_of_one_process(llama, tmp_path, layout, quantized, is_stored):
    """Features are cut between groups that share a scale."""
    folder, how = llama.folder, {"quantize": quantized}
    if is_stored:
        folder, how = tmp_path / quantized, {}
        quantize(str(llama.folder), folder, quantized)
    alone = LLM(str(folder), dtype="float32", num_threads=1, max_model_len=MAX_MODEL_LEN, **how)
    expected = tokens_of(alone.generate(as_prompts(PROMPTS), GREEDY))
    with closing(thread_llm(folder, **how, **CROWDED, **LAYOUTS[layout])) as llm:
        assert tokens_of(llm.generate(as_prompts(PROMPTS), GREEDY)) == expected


needs_native = pytest.mark.skipif(not HAS_NATIVE, reason="the native module is not built")

PROCESSES = [
    pytest.param("llama-gqa", "tp4", "shm", id="llama-gqa-tp4-shm", marks=needs_native),
    pytest.param("chatglm3", "tp2-pp2", "shm", id="chatglm3-tp2-pp2-shm", marks=needs_native),
    pytest.param("opt-350m", "pp3", "shm", id="opt-350m-pp3-shm", marks=needs_native),
    pytest.param("gemma3", "tp2-pp2", "shm", id="gemma3-tp2-pp2-shm", marks=needs_native),
    pytest.param("mixtral", "pp1-2", "shm", id="mixtral-pp1-2-shm", marks=needs_native),
    pytest.param("qwen3-moe", "tp2", "shm", id="qwen3-moe-tp2-shm", marks=needs_native),
    pytest.param("llama-gqa", "tp2-pp2", "gloo", id="llama-gqa-tp2-pp2-gloo"),
]


@pytest.mark.parametrize(("name", "layout", "transport"), PROCESSES)
def test_ranks_as_processes(tmp_path, name, layout, transport):
    subject = make_subject(BY_NAME[name], tmp_path)
    settings = CROWDED | LAYOUTS[layout] | {"transport": transport}
    with closing(LLM(str(tmp_path), dtype="float32", **settings)) as llm:
        assert_crowd(llm, subject, settings, Transport(transport))
        assert llm.engine.model.executor.exchange_differences() == []


@needs_native
def test_long_messages_of_processes(llama):
    """Above 32 KiB four ranks add up in two shots: 128 tokens of 64 values in float32."""
    settings = CROWDED | LAYOUTS["tp4"] | {"max_num_batched_tokens": 256, "num_blocks": 64, "max_num_seqs": 8}
    with closing(LLM(str(llama.folder), dtype="float32", **settings)) as llm:
        plans = record_plans(llm)
        outputs = llm.generate(as_prompts(PROMPTS[i] for i in ORDER), GREEDY)
        assert tokens_of(outputs) == [llama.tokens[i] for i in ORDER]
        engine = llm.engine
        ledgers = engine.model.executor.ledger_rows()
        assert {row.algorithm for row in ledgers[0]} == {"direct", "two_shot"}
        rules = rules_of(Transport.SHM)
        assert_ledgers_as_predicted(ledgers, plans, engine.model.config, parallel_config(settings), rules)


MPIEXEC = Path(sys.executable).parent / "mpiexec"


@needs_native
@pytest.mark.skipif(not MPIEXEC.exists(), reason="there is no mpiexec beside this Python")
@pytest.mark.parametrize("layout", ["tp2-pp2"])
def test_ranks_of_mpiexec(llama, layout):
    settings = CROWDED | LAYOUTS[layout]
    asked = json.dumps({"folder": str(llama.folder), "tokens": llama.tokens, "settings": settings})
    num_ranks = parallel_config(settings).world_size
    command = [str(MPIEXEC), "-n", str(num_ranks), sys.executable, str(Path(__file__)), asked]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=55)
    assert done.returncode == 0, done.stderr + done.stdout
    assert done.stdout.split() == ["rank", "0", "is", "done"]


def main() -> None:
    """One of the ranks of `test_ranks_of_mpiexec`."""
    asked = json.loads(sys.argv[1])
    subject = Subject(folder=Path(asked["folder"]), tokens=asked["tokens"], num_layers=3)
    with closing(LLM(asked["folder"], dtype="float32", **asked["settings"])) as llm:
        assert_crowd(llm, subject, asked["settings"], Transport.MPI)
    print("rank 0 is done")


if __name__ == "__main__":
    main()
