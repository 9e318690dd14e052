"""Compiles the forms that outputs must have. llguidance is loaded with the first one, so that who asks for none starts
sooner, and without it."""

import threading
from collections.abc import Iterable
from functools import cached_property
from typing import TYPE_CHECKING

from headrace.config import StructuredOutputs
from headrace.errors import RequestError
from headrace.tokenizer import Tokenizer

if TYPE_CHECKING:
    from headrace.engine.grammar import Grammar, Vocabulary


class GrammarCompiler:
    """From the form asked for to a grammar over one model's tokens. Any thread may call it.

    tokenizer: of the model; without one there are no structured outputs.
    vocab_size: of the logits. What the tokenizer does not have is never allowed.
    eos_token_ids: all of them are allowed where an output may end.
    """

    def __init__(self, tokenizer: Tokenizer | None, vocab_size: int, eos_token_ids: Iterable[int]) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._eos_token_ids = frozenset(eos_token_ids)
        self._lock = threading.Lock()

    def compile(self, form: StructuredOutputs) -> "Grammar":
        """
        Raises:
            RequestError: llguidance is not installed; the model has no tokenizer that it reads; or see `compile_form`.
        """
        try:
            from headrace.engine.grammar import compile_form
        except ModuleNotFoundError as error:
            raise RequestError(f"structured outputs need llguidance ({error}); pip install llguidance") from error
        return compile_form(form, self._known)

    def _known(self) -> "Vocabulary":
        with self._lock:
            return self._vocabulary

    @cached_property
    def _vocabulary(self) -> "Vocabulary":
        """Takes 0.2 s with 32,000 tokens, so that it waits for the first request that needs it."""
        from headrace.engine.grammar import Vocabulary

        if self._tokenizer is None:
            raise RequestError("structured outputs need a tokenizer, and this model folder has none")
        return Vocabulary(self._tokenizer, self._vocab_size, self._eos_token_ids)
