"""The forms that outputs must have: what each unfinished output may say next."""

from collections.abc import Mapping
from collections.abc import Sequence as Sequences
from typing import TYPE_CHECKING, NamedTuple

from headrace.config import SamplingParams
from headrace.engine.grammar_compiler import GrammarCompiler
from headrace.engine.plan import SampledToken, StepPlan
from headrace.engine.sequence import Sequence
from headrace.errors import RequestError

if TYPE_CHECKING:
    from headrace.engine.grammar import Grammar, GrammarMatcher


class Progress(NamedTuple):
    """is_complete: nothing may follow. error: why nothing can, though the form is not complete."""

    is_complete: bool = False
    error: str | None = None


_NONE: Mapping[int, Progress] = {}


class Guides:
    """Owns the matchers of unfinished sequences. What a sequence may say next is looked up as soon as its last token is
    known, so that a plan only takes it along.
    """

    def __init__(self, compiler: GrammarCompiler) -> None:
        self._compiler = compiler
        self._matchers: dict[int, GrammarMatcher] = {}

    def compile(self, params: SamplingParams, grammar: "Grammar | None") -> "Grammar | None":
        """What the parameters ask for, which may have been compiled before.

        Raises:
            RequestError: see `GrammarCompiler.compile`; a grammar that the parameters do not ask for.
        """
        if params.structured_outputs is None:
            if grammar is not None:
                raise RequestError("a grammar is given, but structured_outputs are not; give both, or neither")
            return None
        return self._compiler.compile(params.structured_outputs) if grammar is None else grammar

    def add(self, sequences: Sequences[Sequence], grammar: "Grammar") -> None:
        self._matchers |= {s.seq_id: grammar.matcher(ignore_eos=s.params.ignore_eos) for s in sequences}

    def drop(self, seq_id: int) -> None:
        self._matchers.pop(seq_id, None)

    def masked(self, plan: StepPlan) -> StepPlan:
        """The plan with a mask for each sequence that it samples and that must have a form."""
        if not self._matchers:
            return plan
        sampled = [chunk.seq_id for chunk in plan.chunks if chunk.samples and chunk.seq_id in self._matchers]
        return plan._replace(masks=tuple([(seq_id, self._matchers[seq_id].mask) for seq_id in sampled]))

    def take(self, tokens: Sequences[SampledToken]) -> Mapping[int, Progress]:
        """Follow sequences by a token each. By sequence id, of those that must have a form."""
        if not self._matchers:
            return _NONE
        return {token.seq_id: self._follow(token) for token in tokens if token.seq_id in self._matchers}

    def _follow(self, token: SampledToken) -> Progress:
        matcher = self._matchers[token.seq_id]
        try:
            matcher.accept(token.token_id)
        except RequestError as error:
            return Progress(error=f"the structured output cannot go on: {error}; ask for a simpler form")
        return Progress(matcher.is_complete)
