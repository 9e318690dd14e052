"""Which tokens may come next in an output that must have a certain form. llguidance compiles and follows grammars.

A grammar is compiled when a request is admitted, under limits that bound its time and memory. Whatever it is asked
afterwards is bounded by the same limits; one that runs into them fails its own request.
"""

import time
from collections.abc import Callable, Iterable
from copy import copy

import llguidance
import numpy as np
from numpy.typing import NDArray

from headrace.config import StructuredOutputs
from headrace.engine.grammar_budget import TimeBudget
from headrace.engine.grammar_source import grammar_source
from headrace.engine.grammar_vocabulary import make_ll_tokenizer
from headrace.errors import RequestError
from headrace.tokenizer import Tokenizer

Words = NDArray[np.uint32]

_LIMITS = llguidance.LLParserLimits(
    max_items_in_row=5000,  # enough for an object of 1000 properties
    step_max_items=10_000,  # an ambiguous grammar gives up after 0.1 s, not after minutes
    initial_lexer_fuel=250_000,  # what no regular expression of 128 KiB needs; bounds its expansion to 50 MB
    max_lexer_states=20_000,  # of 1 to 2 KB each
    step_lexer_fuel=100_000,
    verbose_errors=False,
)

_NOTHING = "no token of this model satisfies it"
_IN_OTHER_WORDS = {
    "NoExtension": _NOTHING,
    "coerce_one_of": "options of oneOf that may be true together cannot be told apart; say anyOf where that will do",
}

_KINDS = {
    "json": "the JSON schema",
    "json_object": "a JSON object",
    "regex": "the regular expression",
    "choice": "the list of choices",
    "grammar": "the grammar",
}


def compile_form(form: StructuredOutputs, vocabulary: Callable[[], "Vocabulary"]) -> "Grammar":
    """
    vocabulary: of the model; asked for once the form is known to be one.

    Raises:
        RequestError: the form is not one, asks for what cannot be enforced, allows nothing, or takes more time or
            memory than a request may.
    """
    try:
        source = grammar_source(form)
    except RecursionError:
        raise _refused(form, "it is nested too deeply") from None
    except ValueError as error:
        raise _refused(form, str(error)) from None
    known = vocabulary()
    matcher = llguidance.LLMatcher(known.ll_tokenizer, source, log_level=0, limits=_LIMITS)
    if matcher.is_error():
        raise _refused(form, matcher.get_error())
    warnings = matcher.get_grammar_warnings()
    # A grammar may say of its own schemas that what cannot be enforced is to be read past.
    if warnings and form.grammar is None:
        raise _refused(form, warnings[0])
    try:
        start = GrammarMatcher(matcher, known)
        start.fork(TimeBudget()).probe()
    except RequestError as error:
        raise _refused(form, str(error)) from None
    if start.is_complete:
        raise _refused(form, "it allows no output but an empty one")
    return Grammar(start)


class Vocabulary:
    """The tokens of a model as a grammar sees them.

    llguidance knows one end of sequence, which stands for all that the model has, also where it has none.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_token_ids: frozenset[int]) -> None:
        self.eos_token_ids = eos_token_ids
        known_ids = sorted(i for i in eos_token_ids if i < tokenizer.vocab_size) or sorted(tokenizer.special_ids)
        if not known_ids:
            raise RequestError("structured outputs need a tokenizer with special tokens, and this model's has none")
        self.ll_tokenizer = make_ll_tokenizer(tokenizer, vocab_size, known_ids[0])
        self.end_id = known_ids[0]
        self.num_words = (vocab_size + 31) // 32
        real_ids = [i for i in range(min(vocab_size, tokenizer.vocab_size)) if tokenizer.has_token(i)]
        self.real = words_of([i for i in real_ids if i != self.end_id], self.num_words)
        self.eos = words_of([i for i in eos_token_ids if i < vocab_size], self.num_words)


class Grammar:
    """A form, compiled for one request: each output follows it with a matcher of its own, in the time they share."""

    def __init__(self, start: "GrammarMatcher") -> None:
        self._start, self._budget = start, TimeBudget()

    def matcher(self, *, ignore_eos: bool = False) -> "GrammarMatcher":
        """
        ignore_eos: no end of sequence is allowed, so that the output goes on as long as the form does.
        """
        return self._start.fork(self._budget, ignore_eos=ignore_eos)


class GrammarMatcher:
    """Follows one output.

    mask: the tokens that may come next, bit i of word j for token 32 j + i; ceil(vocab_size / 32) little-endian words.
    is_complete: nothing may, as the form is complete.

    Raises:
        RequestError: neither may anything come next nor may the output end; or a limit was reached.
    """

    def __init__(self, matcher: llguidance.LLMatcher, vocabulary: Vocabulary) -> None:
        self._matcher = matcher
        self._vocabulary = vocabulary
        self._ignore_eos = False
        self._budget = TimeBudget()
        self._num_tokens = 0
        self.mask, self.is_complete = b"", False
        self._look_ahead()

    def fork(self, budget: TimeBudget, *, ignore_eos: bool = False) -> "GrammarMatcher":
        """Another output that goes on from here, in the time that the budget has."""
        other = copy(self)
        other._budget = budget
        other._matcher = self._matcher.deep_copy()
        other._ignore_eos = ignore_eos
        if ignore_eos:
            other.mask = (np.frombuffer(self.mask, np.uint32) & ~self._vocabulary.eos).tobytes()
        return other

    def accept(self, token_id: int) -> None:
        """Take the token that was chosen. An end of sequence ends the output, and nothing is asked after it.

        Raises:
            RequestError: the token is not allowed, or see the class.
        """
        if token_id in self._vocabulary.eos_token_ids:
            return
        self._budget.check()
        start_s = time.thread_time()
        self._num_tokens += 1
        try:
            if not self._matcher.consume_token(token_id):
                raise _stopped(self._matcher)
            self._look_ahead()
        finally:
            self._budget.spend(time.thread_time() - start_s, self._num_tokens)

    def probe(self) -> None:
        """Go one token on: what reaches a limit most often does so with the first one.

        Raises:
            RequestError: see the class.
        """
        allowed = np.frombuffer(self.mask, np.uint32) & ~self._vocabulary.eos
        if allowed.any():
            word = int(allowed.nonzero()[0][0])
            self.accept(32 * word + (int(allowed[word]) & -int(allowed[word])).bit_length() - 1)

    def _look_ahead(self) -> None:
        vocabulary = self._vocabulary
        words = np.frombuffer(self._matcher.compute_bitmask(), np.uint32)
        if self._matcher.is_error():
            raise _stopped(self._matcher)
        # Says that the output may end, and nothing else.
        may_end = bool(words[vocabulary.end_id // 32] >> vocabulary.end_id % 32 & 1)
        words = words[: vocabulary.num_words] & vocabulary.real
        can_go_on = bool(words.any())
        self.is_complete = may_end and not can_go_on
        if not may_end and not can_go_on:
            raise RequestError(_NOTHING)
        if may_end and not self._ignore_eos:
            words |= vocabulary.eos
        self.mask = words.tobytes()


def words_of(token_ids: Iterable[int], num_words: int) -> Words:
    bits = np.zeros(32 * num_words, np.uint8)
    bits[list(token_ids)] = 1
    return np.packbits(bits, bitorder="little").view(np.uint32)


def _refused(form: StructuredOutputs, reason: str) -> RequestError:
    """Named by its kind: clients and commands have fields and options of many names for it."""
    [kind] = form.to_mapping()
    return RequestError(f"{_KINDS[kind]} cannot be compiled: {_in_one_line(reason)}; change what is asked for")


def _stopped(matcher: llguidance.LLMatcher) -> RequestError:
    return RequestError(_in_one_line(matcher.get_error()))


def _in_one_line(reason: str) -> str:
    """Of what llguidance says over many lines, with pictures, the line that names the error."""
    lines = [line.strip() for line in reason.splitlines() if line.strip()]
    named = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    line = ((named or lines or ["no reason was given"])[0])[:200]
    return next((ours for theirs, ours in _IN_OTHER_WORDS.items() if theirs in line), line)
