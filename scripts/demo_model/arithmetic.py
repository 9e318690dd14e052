"""Addition of two numbers of up to two digits, with a tenth of the pairs kept out of the training text.

A pair is held out in both orders, because the sum of one order gives away the other.
"""

from __future__ import annotations

import re
from functools import cache
from random import Random

LIMIT = 100
HELD_OUT_SHARE = 0.1
SMALL_SHARE = 0.08
SPLIT_SEED = 20_231_111

Pair = tuple[int, int]

TEMPLATES = (
    "What is {} + {}?",
    "What is {} + {}?",
    "{} + {}",
    "{} + {} = ?",
    "{}+{}",
    "What is {} plus {}?",
    "{} plus {}?",
    "Add {} and {}.",
    "Compute {} plus {}.",
    "Compute {} + {}.",
    "Calculate {} + {}.",
    "How much is {} + {}?",
    "How much is {} plus {}?",
    "What is the sum of {} and {}?",
    "Can you add {} and {}?",
    "Please add {} and {}.",
    "What do you get when you add {} to {}?",
)
FOLLOW_UPS = ("And {} + {}?", "Now {} + {}.", "What about {} + {}?", "And what is {} plus {}?")

ADDITION = re.compile(r"(\d+)\s*(?:\+|plus|and|to)\s*(\d+)")
"""Finds every addition in generated text, whatever its wording."""


@cache
def held_out_pairs() -> frozenset[Pair]:
    """The ordered pairs that never occur in the training text; closed under swapping."""
    unordered = [(one, other) for one in range(LIMIT) for other in range(one, LIMIT)]
    chosen = Random(SPLIT_SEED).sample(unordered, round(len(unordered) * HELD_OUT_SHARE))
    return frozenset(chosen) | frozenset((other, one) for one, other in chosen)


@cache
def training_pairs() -> tuple[Pair, ...]:
    """All other ordered pairs, sorted."""
    held_out = held_out_pairs()
    return tuple((one, other) for one in range(LIMIT) for other in range(LIMIT) if (one, other) not in held_out)


@cache
def small_training_pairs() -> tuple[Pair, ...]:
    """The training pairs of one-digit numbers."""
    return tuple(pair for pair in training_pairs() if max(pair) < 10)


def answer(pair: Pair) -> str:
    """The accepted answer, e.g. ``37 + 45 = 82.``"""
    return f"{pair[0]} + {pair[1]} = {sum(pair)}."


@cache
def one_digit_training_pairs() -> tuple[Pair, ...]:
    """The training pairs with an operand of one digit."""
    return tuple(pair for pair in training_pairs() if min(pair) < 10)


def training_pair(rng: Random, one_digit_share: float) -> Pair:
    """A training pair; small ones are drawn more often, because every larger sum is made of them."""
    if one_digit_share and rng.random() < one_digit_share:
        return rng.choice(one_digit_training_pairs())
    return rng.choice(small_training_pairs() if rng.random() < SMALL_SHARE else training_pairs())


def addition(rng: Random, follow_up: bool = False, one_digit_share: float = 0.0) -> tuple[str, str]:
    """A question about a training pair, and its answer."""
    pair = training_pair(rng, one_digit_share)
    template = rng.choice(FOLLOW_UPS if follow_up and rng.random() < 0.3 else TEMPLATES)
    return template.format(*pair), answer(pair)
