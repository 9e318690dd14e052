"""The measures of the evaluation, each a name, a share or a loss, and how many cases it rests on."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from random import Random

import torch
from tokenizers import Tokenizer

from scripts.demo_model import arithmetic, unknowns
from scripts.demo_model.batches import encode
from scripts.demo_model.corpus import Document, common_facts
from scripts.demo_model.facts import Fact, held_out_phrasings, phrasings
from scripts.demo_model.generation import Oracle
from scripts.demo_model.held_out import held_out_dialogues, held_out_stories
from scripts.demo_model.inference_facts import inference_facts
from scripts.demo_model.plots import CAST, GIRLS
from scripts.demo_model.stories import article


@dataclass(frozen=True, slots=True)
class Measure:
    """One row of the table."""

    name: str
    value: float
    cases: int
    unit: str = "share"
    misses: tuple[str, ...] = ()
    """A few wrong answers, as ``question -> answer``."""


def share_correct(oracle: Oracle, name: str, cases: Sequence[tuple[str, str]]) -> Measure:
    """Share of questions whose greedy answer equals the accepted one."""
    replies = oracle.ask([question for question, _ in cases])
    misses = [f"{case[0]} -> {reply}" for case, reply in zip(cases, replies, strict=True) if reply != case[1]]
    return Measure(name, 1 - len(misses) / len(cases), len(cases), misses=tuple(misses))


def additions(oracle: Oracle, name: str, pairs: Sequence[arithmetic.Pair], rng: Random) -> Measure:
    """Sums asked in all wordings."""
    templates = [rng.choice(arithmetic.TEMPLATES) for _ in pairs]
    questions = [template.format(*pair) for template, pair in zip(templates, pairs, strict=True)]
    return share_correct(oracle, name, list(zip(questions, map(arithmetic.answer, pairs), strict=True)))


def asked_facts(
    oracle: Oracle, name: str, facts: Sequence[Fact], wordings: Callable[[Fact], list[str]], per_fact: int, rng: Random
) -> Measure:
    """Facts asked in ``per_fact`` of their wordings."""
    cases = []
    for fact in facts:
        known = sorted(set(wordings(fact)))
        cases += [(question, fact.answer) for question in rng.sample(known, min(per_fact, len(known)))]
    return share_correct(oracle, name, cases)


def refusals(oracle: Oracle) -> Measure:
    """Share of untaught questions that are refused in either of the two taught ways."""
    replies = oracle.ask(unknowns.HELD_OUT_UNKNOWNS)
    accepted = (unknowns.DO_NOT_KNOW, unknowns.ONLY_ADD)
    pairs = zip(unknowns.HELD_OUT_UNKNOWNS, replies, strict=True)
    misses = tuple(f"{question} -> {reply}" for question, reply in pairs if reply not in accepted)
    return Measure("untaught questions refused", 1 - len(misses) / len(replies), len(replies), misses=misses)


def consistent_stories(oracle: Oracle) -> Measure:
    """Share of requested stories that are about the requested kind and keep two names and one pair of pronouns."""
    questions = [f"Tell me a short story about {article(kind)}." for kind in CAST]
    stories = oracle.ask(questions, max_new_tokens=220)
    misses = tuple(
        f"{question} -> {story}"
        for kind, question, story in zip(CAST, questions, stories, strict=True)
        if not is_consistent(story, kind)
    )
    return Measure("stories that are consistent", 1 - len(misses) / len(stories), len(stories), misses=misses)


def is_consistent(story: str, kind: str) -> bool:
    """The first sentence introduces the kind by its name; one other character at most; only the hero's pronouns."""
    first_sentence, words = story.split(".")[0], re.findall(r"\w+", story)
    others = {"he", "him", "his"} if kind in GIRLS else {"she", "her"}
    return (
        kind in first_sentence
        and CAST[kind] in first_sentence
        and len(set(CAST.values()).intersection(words)) <= 2
        and not others.intersection(word.lower() for word in words)
    )


def held_out_loss(oracle: Oracle, name: str, documents: Sequence[Document], only_replies: bool) -> Measure:
    """Mean cross-entropy in nats per token; over replies and plain text only, or over all tokens."""
    tokenizer = Tokenizer.from_file(str(oracle.folder / "tokenizer.json"))  # the oracle's own one pads
    total, count = 0.0, 0
    for document in documents:
        ids, weights = (torch.tensor(values) for values in encode([document], tokenizer))
        with torch.inference_mode():
            losses = torch.nn.functional.cross_entropy(
                oracle.model(ids[None]).logits[0, :-1], ids[1:], reduction="none"
            )
        kept = weights[1:] == 1.0 if only_replies else torch.ones_like(losses, dtype=torch.bool)
        total += losses[kept].sum().item()
        count += int(kept.sum())
    return Measure(name, total / count, count, unit="nats/token")


def all_measures(oracle: Oracle, seed: int = 0) -> Iterator[Measure]:
    """Every row of the table, in order; each is yielded as soon as it is known."""
    rng = Random(seed)
    held_out = sorted(arithmetic.held_out_pairs())
    yield additions(oracle, "addition, held-out pairs (all)", held_out, rng)
    yield additions(oracle, "addition, trained pairs", rng.sample(arithmetic.training_pairs(), 500), rng)
    for topic, facts in (("common", common_facts()), ("inference", inference_facts())):
        yield asked_facts(oracle, f"{topic} facts, trained wordings", facts, phrasings, 2, rng)
        yield asked_facts(oracle, f"{topic} facts, held-out wordings", facts, held_out_phrasings, 2, rng)
    yield refusals(oracle)
    yield consistent_stories(oracle)
    stories = [Document(text=story) for story in held_out_stories(100)]
    dialogues = held_out_dialogues(100)
    yield held_out_loss(oracle, "held-out stories", stories, only_replies=True)
    yield held_out_loss(oracle, "held-out dialogues, replies", dialogues, only_replies=True)
    yield held_out_loss(oracle, "held-out dialogues, all tokens", dialogues, only_replies=False)
