"""What a taught fact is, and the wordings it is asked in.

A fact names its subject as a noun phrase ("the largest ocean"), so that every fact can be put through every template.
Some templates are kept out of the training text: they measure whether the model learned the fact or the wording.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random


@dataclass(frozen=True, slots=True)
class Fact:
    """One taught fact with its only accepted answer."""

    subject: str
    answer: str
    questions: tuple[str, ...] = ()
    """Wordings of this fact's own, besides the templates."""
    aliases: tuple[str, ...] = ()
    """Other noun phrases for the subject."""
    explained: bool = False
    """True for a concept, which is explained; false for a value, which is named."""


VALUE_TEMPLATES = (
    "What is {}?",
    "What is {}?",
    "What's {}?",
    "Tell me {}.",
    "Can you tell me {}?",
    "Please tell me {}.",
    "Do you know {}?",
    "Name {}.",
    "Give me {}.",
    "I would like to know {}.",
    "Can you tell me what {} is?",
    "Do you know what {} is?",
    "I need to know what {} is.",
    "Could you tell me {}?",
    "{}?",
)
HELD_OUT_VALUE_TEMPLATES = (
    "Could you please tell me what {} is?",
    "I want to know what {} is.",
    "Would you tell me {}?",
    "So what is {}, please?",
)
CONCEPT_TEMPLATES = (
    "What is {}?",
    "What is {}?",
    "What's {}?",
    "What does {} mean?",
    "What do you mean by {}?",
    "Explain {}.",
    "Please explain {}.",
    "Can you explain {}?",
    "Explain what {} is.",
    "Define {}.",
    "Describe {}.",
    "Tell me about {}.",
    "Tell me what {} is.",
    "Can you tell me what {} is?",
    "I do not understand {}.",
    "Could you describe {}?",
    "{}?",
)
HELD_OUT_CONCEPT_TEMPLATES = (
    "Could you explain to me what {} is?",
    "What exactly is {}?",
    "Help me understand {}.",
    "Please describe what {} means.",
)
OPENERS = (
    "Quick question: ",
    "I have a question: ",
    "Tell me, ",
    "Hey, ",
    "Please answer: ",
    "One more question: ",
    "And ",
)
HELD_OUT_OPENERS = ("Okay, ", "My question is this: ")


def capitalise(text: str) -> str:
    """Raise the first letter only: ``str.capitalize`` would lower the rest."""
    return text[:1].upper() + text[1:]


def lower_first(text: str) -> str:
    """Lower the first letter, unless the first word is an acronym or has one letter."""
    return text if text[1:2].isupper() else text[:1].lower() + text[1:]


def phrasings(fact: Fact) -> list[str]:
    """Every wording of ``fact`` that may occur in the training text, before noise and openers."""
    templates = CONCEPT_TEMPLATES if fact.explained else VALUE_TEMPLATES
    subjects = (fact.subject, *fact.aliases)
    return [capitalise(template.format(subject)) for template in templates for subject in subjects] + [*fact.questions]


def held_out_phrasings(fact: Fact) -> list[str]:
    """Every wording of ``fact`` that never occurs in the training text."""
    templates = HELD_OUT_CONCEPT_TEMPLATES if fact.explained else HELD_OUT_VALUE_TEMPLATES
    worded = [capitalise(template.format(fact.subject)) for template in templates]
    return worded + [opener + lower_first(question) for opener in HELD_OUT_OPENERS for question in fact.questions[:1]]


NOISE: tuple[Callable[[str], str], ...] = (
    lambda text: text.rstrip("?.!"),
    lambda text: text.lower(),
    lambda text: text.lower().rstrip("?.!"),
    lambda text: text.rstrip("?.") + ", please" + text[len(text.rstrip("?.")) :],
)


def add_noise(text: str, rng: Random) -> str:
    """Now and then change case or punctuation, or add an opener, as people do when they type."""
    chance = rng.random()
    if chance < 0.12:
        return rng.choice(NOISE)(text)
    if chance < 0.20:
        return rng.choice(OPENERS) + lower_first(text)
    return text


def ask(fact: Fact, rng: Random) -> str:
    """One wording of ``fact``; its own questions weigh as much as all templates together."""
    own = fact.questions if fact.questions and rng.random() < 0.5 else phrasings(fact)
    return add_noise(rng.choice(own), rng)
