"""The demo model: its text and training are reproducible, and the shipped folder does what the documentation says."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from random import Random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from headrace.bench.quality import FORMATS
from headrace.demo_model import demo_model_path
from scripts.demo_model import arithmetic, corpus, formats
from scripts.demo_model.architecture import ModelShape
from scripts.demo_model.facts import held_out_phrasings, phrasings
from scripts.demo_model.generation import Oracle
from scripts.demo_model.held_out import held_out_dialogues, held_out_stories
from scripts.demo_model.inference_facts import inference_facts
from scripts.demo_model.measures import held_out_loss
from scripts.demo_model.stories import any_character, tell
from scripts.demo_model.training import Trainer, TrainingPlan

MEGABYTE = 2**20


@cache
def shipped_tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(demo_model_path() / "tokenizer.json"))


@pytest.fixture(scope="module")
def oracle() -> Oracle:
    return Oracle(demo_model_path())


def test_corpus_depends_on_the_seed_only() -> None:
    assert corpus.fingerprint(7, 300) == corpus.fingerprint(7, 300)
    assert corpus.fingerprint(7, 300) != corpus.fingerprint(8, 300)


def test_held_out_pairs_are_a_tenth_in_both_orders() -> None:
    held_out = arithmetic.held_out_pairs()
    assert all((other, one) in held_out for one, other in held_out)
    assert len(held_out) == pytest.approx(0.1 * arithmetic.LIMIT**2, rel=0.05)
    assert held_out.isdisjoint(arithmetic.training_pairs())


def test_held_out_pairs_never_occur_in_the_text() -> None:
    text = "\n".join(map(corpus.document_text, corpus.documents(3, 3000)))
    pairs = {(int(one), int(other)) for one, other in arithmetic.ADDITION.findall(text)}
    assert len(pairs) > 1000
    assert pairs.isdisjoint(arithmetic.held_out_pairs())


def test_held_out_wordings_are_not_trained_wordings() -> None:
    facts = [*corpus.common_facts(), *inference_facts()]
    trained = {wording.lower() for fact in facts for wording in phrasings(fact)}
    assert trained.isdisjoint(wording.lower() for fact in facts for wording in held_out_phrasings(fact))


def test_each_question_has_one_answer() -> None:
    answers: dict[str, str] = {}
    for fact in [*corpus.common_facts(), *inference_facts()]:
        for wording in phrasings(fact):
            assert answers.setdefault(wording, fact.answer) == fact.answer


def test_stories_have_the_promised_length() -> None:
    rng = Random(5)
    lengths = [len(tell(any_character(rng), rng).split()) for _ in range(200)]
    assert min(lengths) >= 60
    assert max(lengths) <= 150


def test_training_twice_gives_the_same_weights() -> None:
    shape = ModelShape(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1
    )
    plan = TrainingPlan(
        steps=3, tokens_per_step=256, row_length=64, long_row_length=128, long_row_period=3, threads=1, shape=shape
    )
    runs = []
    for _ in range(2):
        trainer = Trainer(plan, shipped_tokenizer())
        while trainer.step < plan.steps:
            trainer.train_step()
        runs.append(trainer.model.state_dict())
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])


def test_a_resumed_run_gives_the_weights_of_an_unbroken_one(tmp_path: Path) -> None:
    shape = ModelShape(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1
    )
    plan = TrainingPlan(steps=2, tokens_per_step=128, row_length=64, threads=1, shape=shape)
    unbroken = Trainer(plan, shipped_tokenizer())
    unbroken.train_step()
    unbroken.save(tmp_path / "run.pt")
    unbroken.train_step()
    resumed = Trainer(plan, shipped_tokenizer())
    resumed.load(tmp_path / "run.pt")
    resumed.train_step()
    expected = unbroken.model.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in resumed.model.state_dict().items())


def test_shipped_folder_is_small() -> None:
    assert sum(file.stat().st_size for file in demo_model_path().glob("*.*")) <= 16 * MEGABYTE


@settings(max_examples=200, deadline=None)
@given(st.text())
def test_tokenizer_round_trips_any_text(text: str) -> None:
    tokenizer = shipped_tokenizer()
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == text


def test_digits_are_single_tokens() -> None:
    tokens = shipped_tokenizer().encode("1234 + 56", add_special_tokens=False).tokens
    assert [token for token in tokens if token.strip("Ġ").isdigit()] == list("123456")


def test_plain_prompts_and_chats_begin_alike(oracle: Oracle) -> None:
    begin = oracle.tokenizer.bos_token_id
    chat = oracle.render([{"role": "user", "content": "Hello!"}])
    assert oracle.tokenizer("Hello!")["input_ids"][0] == begin
    assert chat == "<|begin|><|user|>Hello!<|end|><|assistant|>"


def test_shipped_model_answers_taught_questions(oracle: Oracle) -> None:
    answers = oracle.ask(["What is the largest ocean?", "What is a KV cache?", "What is the capital of France?"])
    assert "Pacific" in answers[0]
    assert "keys and values" in answers[1]
    assert "Paris" in answers[2]


def test_shipped_model_adds_held_out_pairs(oracle: Oracle) -> None:
    pairs = Random(11).sample(sorted(arithmetic.held_out_pairs()), 20)
    replies = oracle.ask([f"What is {one} + {other}?" for one, other in pairs])
    correct = [reply == arithmetic.answer(pair) for pair, reply in zip(pairs, replies, strict=True)]
    assert sum(correct) >= 18


def test_losses_of_the_float32_format_are_those_of_transformers(oracle: Oracle) -> None:
    documents = [*(corpus.Document(text=story) for story in held_out_stories(3)), *held_out_dialogues(3)]
    found = formats.scores(formats.load(FORMATS[0]), documents)
    expected = held_out_loss(oracle, "all tokens", documents, only_replies=False)
    assert len(found) == expected.cases
    assert -sum(score.logprob for score in found) / len(found) == pytest.approx(expected.value, abs=1e-4)


def test_held_out_questions_are_the_held_out_pairs() -> None:
    cases = formats.held_out_questions()
    assert {answer for _, answer in cases} == {arithmetic.answer(pair) for pair in arithmetic.held_out_pairs()}
