"""Mixes facts, sums, stories and small talk into conversations and plain texts.

A document is a conversation or a plain text. Plain texts let the model continue a bare prompt, without chat roles.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from random import Random
from typing import Literal

from scripts.demo_model import arithmetic, small_talk, stories, unknowns
from scripts.demo_model.calendar_and_words import calendar_and_word_facts
from scripts.demo_model.facts import Fact, ask
from scripts.demo_model.geography import geography_facts
from scripts.demo_model.inference_facts import inference_facts
from scripts.demo_model.nature import nature_facts

Role = Literal["system", "user", "assistant"]
Exchange = tuple[str, str]


@dataclass(frozen=True, slots=True)
class Turn:
    """One message."""

    role: Role
    content: str


@dataclass(frozen=True, slots=True)
class Document:
    """Either the turns of a conversation or, with a single ``None`` role, plain text."""

    turns: tuple[Turn, ...] = ()
    text: str = ""


SYSTEM_MESSAGES = (
    "You are a helpful assistant.",
    "You are a friendly assistant.",
    "Answer briefly.",
    "You are the demo model of Headrace.",
    "Be polite and short.",
)


def common_facts() -> list[Fact]:
    """Everything taught that is not about inference."""
    return [*geography_facts(), *nature_facts(), *calendar_and_word_facts()]


@dataclass(frozen=True, slots=True)
class Mix:
    """How often each kind of exchange is drawn, and the share of plain texts among the documents."""

    additions: float = 0.42
    common_facts: float = 0.24
    inference_facts: float = 0.11
    stories: float = 0.06
    small_talk: float = 0.06
    remarks: float = 0.03
    unknowns: float = 0.08
    plain_texts: float = 0.18
    one_digit_additions: float = 0.0
    """Share of the sums that have an operand of one digit, besides those drawn by chance."""


REFINING_MIX = Mix(
    additions=0.36,
    common_facts=0.22,
    inference_facts=0.13,
    stories=0.13,
    small_talk=0.05,
    remarks=0.02,
    unknowns=0.09,
    plain_texts=0.15,
    one_digit_additions=0.4,
)
"""More of what the first mix teaches last: consistent stories, and sums with an operand of one digit."""


class Corpus:
    """An endless, seeded stream of documents."""

    def __init__(self, seed: int | str, mix: Mix | None = None) -> None:
        self.rng = Random(seed)
        self.mix = mix = mix or Mix()
        self.common = common_facts()
        self.inference = inference_facts()
        self.exchanges: tuple[tuple[float, Callable[[], Exchange]], ...] = (
            (mix.additions, self.sum),
            (mix.common_facts, lambda: self.asked(self.common)),
            (mix.inference_facts, lambda: self.asked(self.inference)),
            (mix.stories, lambda: stories.requested_story(self.rng)),
            (mix.small_talk, lambda: small_talk.talk(small_talk.QUESTIONS, self.rng)),
            (mix.remarks, lambda: small_talk.talk(small_talk.REMARKS, self.rng)),
            (mix.unknowns, lambda: unknowns.unknown(self.rng)),
        )

    def sum(self, follow_up: bool = False) -> Exchange:
        """A question about a sum."""
        return arithmetic.addition(self.rng, follow_up, self.mix.one_digit_additions)

    def asked(self, facts: list[Fact]) -> Exchange:
        """A question about one of ``facts``."""
        fact = self.rng.choice(facts)
        return ask(fact, self.rng), fact.answer

    def exchange(self) -> Exchange:
        """One question and answer on any topic."""
        weights = [weight for weight, _ in self.exchanges]
        return self.rng.choices([make for _, make in self.exchanges], weights)[0]()

    def conversation(self) -> Document:
        """One to eight exchanges; greetings open and farewells close some of them."""
        rng = self.rng
        exchanges = [self.exchange() for _ in range(rng.choice((1, 1, 1, 1, 2, 2, 3, 4, 5, 6)))]
        if rng.random() < 0.12:
            exchanges.insert(0, small_talk.talk(small_talk.GREETINGS, rng))
        if rng.random() < 0.10:
            exchanges.append(self.follow_up(exchanges[-1]))
        if rng.random() < 0.10:
            exchanges.append(small_talk.talk(small_talk.FAREWELLS, rng))
        return as_document(exchanges, rng.choice(SYSTEM_MESSAGES) if rng.random() < 0.1 else None)

    def follow_up(self, last: Exchange) -> Exchange:
        """An exchange that leans on the one before it."""
        if "+" in last[1]:
            return self.sum(follow_up=True)
        if last[1].startswith(("Once", "There once")):
            return stories.requested_story(self.rng, again=True)
        return small_talk.talk(small_talk.REMARKS, self.rng)

    def plain_text(self) -> Document:
        """A story, an answered question, a list of sums or a few facts without chat roles.

        Lists of sums hold twice as many examples per token as conversations do.
        """
        rng, choice = self.rng, self.rng.random()
        if choice < 0.10:
            return Document(text=stories.tell(stories.any_character(rng), rng))
        if choice < 0.30:
            return Document(text=" ".join(self.asked(self.common if rng.random() < 0.7 else self.inference)))
        if choice < 0.85:
            return Document(text="\n".join(self.sum()[1] for _ in range(rng.choice((1, 4, 12, 24)))))
        facts = rng.sample([*self.common, *self.inference], rng.choice((1, 1, 2, 3)))
        return Document(text=" ".join(fact.answer for fact in facts))

    def __iter__(self) -> Iterator[Document]:
        while True:
            yield self.plain_text() if self.rng.random() < self.mix.plain_texts else self.conversation()


def as_document(exchanges: list[Exchange], system: str | None) -> Document:
    """Lay exchanges out as turns, after an optional system message."""
    turns = [Turn("system", system)] if system else []
    for question, reply in exchanges:
        turns += [Turn("user", question), Turn("assistant", reply)]
    return Document(tuple(turns))


def document_text(document: Document) -> str:
    """All text of a document, one turn per line."""
    return document.text or "\n".join(turn.content for turn in document.turns)


def documents(seed: int | str, count: int) -> list[Document]:
    """The first ``count`` documents of a seed."""
    stream = iter(Corpus(seed))
    return [next(stream) for _ in range(count)]


def fingerprint(seed: int, count: int) -> str:
    """SHA-256 of the first ``count`` documents, to check that a rebuild reads the same text."""
    digest = hashlib.sha256()
    for document in documents(seed, count):
        digest.update(document_text(document).encode() + b"\0")
    return digest.hexdigest()
