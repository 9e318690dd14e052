"""Prompts of random content and a given number of tokens.

Each has a beginning of its own, so that a server's prefix cache helps as little as with strangers' questions, unless a
shared beginning is asked for.
"""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import numpy as np

from headrace.bench.serve.words import WORDS

Prompt = str | list[int]
CountTokens = Callable[[str], Awaitable[int]]

_MAX_FITS = 10
_FIRST_ID = 256
"""Low ids are often special tokens and single bytes."""


@dataclass(frozen=True)
class TokenIdPrompts:
    """Token ids, uniform over the vocabulary: exact lengths, for /v1/completions alone."""

    vocab_size: int
    shared: tuple[int, ...] = ()

    @classmethod
    def make(cls, vocab_size: int, shared_tokens: int, rng: np.random.Generator) -> "TokenIdPrompts":
        return cls(vocab_size, tuple(_random_ids(vocab_size, shared_tokens, rng)))

    def next(self, num_tokens: int, rng: np.random.Generator) -> list[int]:
        """`num_tokens` in all; at least one is its own."""
        shared = self.shared[: num_tokens - 1]
        return [*shared, *_random_ids(self.vocab_size, num_tokens - len(shared), rng)]


@dataclass(frozen=True)
class TextPrompts:
    """Words, as many as make the tokens.

    With the server's tokenizer each prompt is fitted to its length; without it a token is taken to be `words_per_token`
    words, and the server's counts of what it got are the ones to believe.
    """

    shared: tuple[str, ...] = ()
    words_per_token: float = 1.0

    @classmethod
    def make(cls, shared_tokens: int, words_per_token: float, rng: np.random.Generator) -> "TextPrompts":
        return cls(tuple(_random_words(round(shared_tokens * words_per_token), rng)), words_per_token)

    async def next(self, num_tokens: int, rng: np.random.Generator, count: CountTokens | None) -> str:
        shared = list(self.shared[: max(0, round(num_tokens * self.words_per_token) - 1)])
        own = _random_words(max(1, round(num_tokens * self.words_per_token) - len(shared)), rng)
        if count is None:
            return " ".join([*shared, *own])
        best, best_excess = "", float("inf")
        for _ in range(_MAX_FITS):
            text = " ".join([*shared, *own])
            excess = await count(text) - num_tokens
            if abs(excess) < best_excess:
                best, best_excess = text, abs(excess)
            num_words = max(1, round(abs(excess) * self.words_per_token))
            if not excess or (excess > 0 and len(own) <= num_words):
                break
            # Words that come in place of others are new ones, of other lengths.
            own = own[:-num_words] if excess > 0 else own + _random_words(num_words, rng)
        return best


def _random_ids(vocab_size: int, num_tokens: int, rng: np.random.Generator) -> list[int]:
    first = _FIRST_ID if vocab_size > 2 * _FIRST_ID else 0
    ids: list[int] = rng.integers(first, vocab_size, num_tokens).tolist()
    return ids


def _random_words(num_words: int, rng: np.random.Generator) -> list[str]:
    return [WORDS[i] for i in rng.integers(0, len(WORDS), num_words).tolist()]
