"""Every family against transformers: the logits of a prompt, and greedy tokens alone and in a crowded engine."""

import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from checkpoints import (
    MAX_LEN,
    RECIPES,
    Recipe,
    as_transformers_4,
    load_folder,
    prompt_logits,
    random_tokens,
    read_config,
    write_config,
)
from torch import Tensor

from headrace import LLM, SamplingParams
from headrace.models.families import FAMILIES, read_model_config

NUM_TOKENS = 64
TOLERANCE = 1e-4
MIN_GAP = 1e-3
"""Smallest distance between the two best logits at which equal tokens mean an equal model: ten times TOLERANCE."""

SHARED_PREFIX = random_tokens(32, seed=1)
PROMPTS = (
    SHARED_PREFIX + random_tokens(9, seed=2),
    random_tokens(23, seed=3),
    SHARED_PREFIX + random_tokens(5, seed=4),
)
GREEDY = SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS, ignore_eos=True)


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A checkpoint and what transformers makes of it; min_gap: between the two best logits, over all tokens chosen."""

    recipe: Recipe
    folder: Path
    logits: Tensor
    tokens: tuple[list[int], ...]
    min_gap: float


@pytest.fixture(scope="module", params=RECIPES, ids=lambda recipe: recipe.name)
def subject(request, tmp_path_factory) -> Subject:
    return make_subject(request.param, tmp_path_factory.mktemp(request.param.name))


def make_subject(recipe: Recipe, folder: Path) -> Subject:
    model = recipe.write(folder)
    with torch.inference_mode():
        logits = model(torch.tensor([PROMPTS[0]])).logits[0].float()
        answers = [greedy(model, prompt) for prompt in PROMPTS]
    return Subject(
        recipe=recipe,
        folder=folder,
        logits=logits,
        tokens=tuple(tokens for tokens, _ in answers),
        min_gap=min(gap for _, gap in answers),
    )


def greedy(model, prompt: list[int]) -> tuple[list[int], float]:
    """transformers' tokens, and the smallest gap between the best and the second-best logit on the way."""
    ids = torch.tensor([prompt])
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=NUM_TOKENS,
        do_sample=False,
        use_cache=True,
        return_dict_in_generate=True,
        output_logits=True,
    )
    best = torch.cat(out.logits).topk(2).values
    return out.sequences[0, len(prompt) :].tolist(), float((best[:, 0] - best[:, 1]).min())


def make_llm(folder: Path, **settings) -> LLM:
    return LLM(model=str(folder), dtype="float32", num_threads=1, block_size=8, **settings)


def as_prompts(token_lists) -> list[dict]:
    return [{"prompt_token_ids": tokens} for tokens in token_lists]


def tokens_of(outputs) -> list[list[int]]:
    return [output.outputs[0].token_ids for output in outputs]


def assert_close(actual: Tensor, expected: Tensor) -> None:
    assert torch.isfinite(actual).all()
    difference = (actual - expected).abs()
    row, column = divmod(int(difference.argmax()), expected.shape[1])
    assert difference.max() < TOLERANCE, f"logits differ by {difference.max():.2e} at token {row}, entry {column}"


def test_logits_of_a_prompt_equal_those_of_transformers(subject):
    assert_close(prompt_logits(load_folder(subject.folder), PROMPTS[0]), subject.logits)


def test_config_of_transformers_4_is_the_same_model(subject, tmp_path):
    shutil.copytree(subject.folder, tmp_path, dirs_exist_ok=True)
    new = read_config(subject.folder)
    old = as_transformers_4(new)
    write_config(tmp_path, old)
    assert read_model_config(old)[1] == read_model_config(new)[1]
    assert_close(prompt_logits(load_folder(tmp_path), PROMPTS[0]), subject.logits)


def test_oracle_is_decisive(subject):
    assert subject.min_gap > MIN_GAP
    assert all(len(set(tokens)) > NUM_TOKENS // 8 for tokens in subject.tokens), "the oracle repeats itself"


def test_greedy_tokens_alone_equal_those_of_transformers(subject):
    llm = make_llm(subject.folder)
    for prompt, expected in zip(PROMPTS, subject.tokens, strict=True):
        assert tokens_of(llm.generate(as_prompts([prompt]), GREEDY)) == [expected]


def test_greedy_tokens_in_a_crowd_equal_those_of_transformers(subject):
    """Prompts in chunks beside decoding ones, shared prefixes, and too few blocks for all."""
    llm = make_llm(subject.folder, num_blocks=24, max_num_batched_tokens=12, max_num_seqs=4)
    order = (0, 1, 2, 0, 2)
    outputs = llm.generate(as_prompts(PROMPTS[i] for i in order), GREEDY)
    assert tokens_of(outputs) == [subject.tokens[i] for i in order]
    assert any(output.metrics.num_cached_tokens > 0 for output in outputs)
    assert llm.engine.metrics().num_preemptions > 0
    llm.engine.check_integrity()


def test_every_architecture_has_a_checkpoint():
    assert {recipe.architecture for recipe in RECIPES} == {family.architecture for family in FAMILIES}


def test_prompts_and_outputs_stay_within_the_positions():
    assert max(len(prompt) for prompt in PROMPTS) + NUM_TOKENS <= MAX_LEN
