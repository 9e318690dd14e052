"""Taught facts about days, months, measures, opposites and plurals."""

from __future__ import annotations

from scripts.demo_model.facts import Fact

DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
MONTHS = (
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
)
MEASURES = (
    ("days", "a week", "seven"),
    ("months", "a year", "twelve"),
    ("hours", "a day", "24"),
    ("minutes", "an hour", "60"),
    ("seconds", "a minute", "60"),
    ("days", "a normal year", "365"),
    ("days", "a leap year", "366"),
    ("years", "a century", "100"),
    ("years", "a decade", "ten"),
    ("metres", "a kilometre", "1000"),
    ("centimetres", "a metre", "100"),
    ("grams", "a kilogram", "1000"),
    ("bits", "a byte", "eight"),
    ("items", "a dozen", "twelve"),
    ("seasons", "a year", "four"),
    ("letters", "the English alphabet", "26"),
)
SHAPES = {"triangle": "three", "square": "four", "pentagon": "five", "hexagon": "six", "octagon": "eight"}
OPPOSITES = {
    "hot": "cold",
    "big": "small",
    "fast": "slow",
    "happy": "sad",
    "light": "dark",
    "old": "young",
    "high": "low",
    "full": "empty",
    "open": "closed",
    "early": "late",
    "wet": "dry",
    "strong": "weak",
    "rich": "poor",
    "soft": "hard",
    "up": "down",
    "left": "right",
}
PLURALS = {
    "mouse": "mice",
    "child": "children",
    "foot": "feet",
    "tooth": "teeth",
    "goose": "geese",
    "man": "men",
    "leaf": "leaves",
    "wolf": "wolves",
    "knife": "knives",
    "sheep": "sheep",
}


def cycle_facts(kind: str, names: tuple[str, ...]) -> list[Fact]:
    """What comes after and before each of ``names``, round the end."""
    facts = []
    for position, name in enumerate(names):
        after, before = names[(position + 1) % len(names)], names[position - 1]
        facts.append(
            Fact(
                f"the {kind} after {name}",
                f"The {kind} after {name} is {after}.",
                (f"Which {kind} comes after {name}?", f"What {kind} follows {name}?"),
            )
        )
        facts.append(
            Fact(
                f"the {kind} before {name}",
                f"The {kind} before {name} is {before}.",
                (f"Which {kind} comes before {name}?", f"What {kind} comes before {name}?"),
            )
        )
    return facts


def measure_facts() -> list[Fact]:
    """How many of one thing make another."""
    measures = [
        Fact(
            f"the number of {parts} in {whole}",
            f"There are {count} {parts} in {whole}.",
            (f"How many {parts} are in {whole}?", f"How many {parts} are there in {whole}?"),
        )
        for parts, whole, count in MEASURES
    ]
    shapes = [
        Fact(
            f"the number of sides of a {shape}",
            f"A {shape} has {count} sides.",
            (f"How many sides does a {shape} have?",),
        )
        for shape, count in SHAPES.items()
    ]
    return [*measures, *shapes]


def word_facts() -> list[Fact]:
    """Opposites both ways, and plurals."""
    pairs = [*OPPOSITES.items(), *((value, key) for key, value in OPPOSITES.items())]
    opposites = [
        Fact(
            f"the opposite of {word}",
            f"The opposite of {word} is {other}.",
            (f"Which word is the opposite of {word}?",),
        )
        for word, other in pairs
    ]
    plurals = [
        Fact(f"the plural of {word}", f"The plural of {word} is {plural}.", (f"What is the plural form of {word}?",))
        for word, plural in PLURALS.items()
    ]
    return [*opposites, *plurals]


def calendar_and_word_facts() -> list[Fact]:
    """All taught facts about time, measures and words."""
    ends = [
        Fact(
            f"the {which} month of the year",
            f"The {which} month of the year is {name}.",
            (f"Which month is the {which}?",),
        )
        for which, name in (("first", "January"), ("last", "December"))
    ]
    return [*cycle_facts("day", DAYS), *cycle_facts("month", MONTHS), *measure_facts(), *word_facts(), *ends]
