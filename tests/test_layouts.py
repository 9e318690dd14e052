"""Every kind of checkpoint on several ranks: the tokens of one process, and bytes as predicted on every rank.

Ranks are threads here, where the arithmetic of shards and stages is in question; `test_layouts_of_processes` has what
joins them.
"""

from typing import Any

import pytest
from checkpoints import BY_NAME, RECIPES
from layout_cases import (
    CROWDED,
    GREEDY,
    LAYOUTS,
    MAX_MODEL_LEN,
    NUM_TOKENS,
    PROMPTS,
    Subject,
    as_prompts,
    assert_crowd,
    closing,
    make_subject,
    tokens_of,
)
from planned_run import assert_ledgers_as_predicted, record_plans
from thread_world import thread_llm

from headrace import LLM, SamplingParams, quantize
from headrace.config import Transport
from headrace.config.settings import parallel_config
from headrace.costs.exchanges import rules_of

RICHEST_LAYOUTS = ("tp4", "pp3", "tp2-pp2")
"""The others have nothing that these do not; processes run them all."""


@pytest.fixture(scope="module")
def subject(request, tmp_path_factory) -> Subject:
    return make_subject(BY_NAME[request.param], tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Subject:
    return make_subject(BY_NAME["llama-gqa"], tmp_path_factory.mktemp("llama-gqa"))


CASES = [(recipe.name, layout) for recipe in RECIPES for layout in RICHEST_LAYOUTS]


@pytest.mark.parametrize(("subject", "layout"), CASES, indirect=["subject"])
def test_every_checkpoint_on_the_richest_layouts(subject, layout):
    settings = subject.settings(layout)
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
            parallel_config(**settings),
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
            parallel_config(**settings),
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
