"""Short stories of 60 to 150 words from a grammar of plots, and the requests that they answer."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from scripts.demo_model.facts import add_noise, capitalise
from scripts.demo_model.plots import CAST, ENDINGS, GIRLS, HOBBIES, PLACES, PLOTS, SPOTS, TIMES, TRAITS

REQUESTS = (
    "Tell me a story.",
    "Tell me a short story.",
    "Can you tell me a story?",
    "Please tell me a story.",
    "Write a short story.",
    "I would like to hear a story.",
    "Do you know a story?",
    "A story, please.",
)
REQUESTS_ABOUT = (
    "Tell me a story about {}.",
    "Tell me a short story about {}.",
    "Write a story about {}.",
    "Write a short story about {}.",
    "Can you tell me a story about {}?",
    "Please tell me a story about {}.",
    "I would like to hear a story about {}.",
    "Do you know a story about {}?",
    "A story about {}, please.",
)
AGAIN = ("Another one, please.", "Tell me another story.", "One more story, please.", "Another story!")
OPENINGS = (
    "Once upon a time, there was {a_kind} named {name} who lived {place}.",
    "Once upon a time, {a_kind} named {name} lived {place}.",
    "There once was {a_kind} named {name} who lived {place}.",
)
HABITS = ("{He} loved {hobby}.", "{He} liked {hobby} more than anything else.", "Every day, {he} spent hours {hobby}.")


@dataclass(frozen=True, slots=True)
class Character:
    """A kind, a name and the pronouns that go with it."""

    kind: str
    name: str
    pronouns: tuple[str, str, str]
    """Subject, object and possessive."""


def article(noun: str) -> str:
    """The noun with its indefinite article."""
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


def character(kind: str) -> Character:
    """The character of a kind."""
    return Character(kind, CAST[kind], ("she", "her", "her") if kind in GIRLS else ("he", "him", "his"))


def any_character(rng: Random) -> Character:
    return character(rng.choice(tuple(CAST)))


def slots(hero: Character, friend: Character, rng: Random) -> dict[str, str]:
    """All slot values of one story."""
    he, him, his = hero.pronouns
    trait = rng.choice(TRAITS)
    return {
        "name": hero.name,
        "kind": hero.kind,
        "a_kind": article(f"{trait} {hero.kind}"),
        "friend": friend.name,
        "friend_kind": friend.kind,
        "he": he,
        "He": capitalise(he),
        "him": him,
        "his": his,
        "place": rng.choice(PLACES),
        "hobby": rng.choice(HOBBIES),
        "spot": rng.choice(SPOTS),
        "time": rng.choice(TIMES),
    }


def tell(hero: Character, rng: Random) -> str:
    """A story about ``hero``; the helper is of another kind."""
    plot = rng.choice(PLOTS)
    first, second = plot.helpers
    friend = character(second if hero.kind == first else first)
    steps = (OPENINGS, HABITS, *plot.steps, ENDINGS, plot.moral)
    values = slots(hero, friend, rng)
    return " ".join(rng.choice(step).format(**values) for step in steps)


def requested_story(rng: Random, again: bool = False) -> tuple[str, str]:
    """A request and a story that fits it."""
    hero = any_character(rng)
    if again:
        return rng.choice(AGAIN), tell(hero, rng)
    if rng.random() < 0.3:
        return add_noise(rng.choice(REQUESTS), rng), tell(hero, rng)
    return add_noise(rng.choice(REQUESTS_ABOUT).format(article(hero.kind)), rng), tell(hero, rng)
