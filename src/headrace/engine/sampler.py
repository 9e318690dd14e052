"""Picks the next token of each sequence from its row of logits.

Per row, in this order (transformers' and vLLM's, but for min_p, which vLLM applies before top_k and top_p): tokens that
the output's form does not allow, logit_bias, tokens forbidden until min_tokens, penalties, then the largest logit if
greedy, else temperature, top_k, top_p, min_p and a draw. Log probabilities are of the raw logits.

A row's token depends on that row alone, bit for bit: rows are handled one at a time, and the random number of output
position i is a pure function of (seed, i). Rows are read on the host by numpy, whose argmax of a large float32 row is
several times faster than torch's on a CPU. Logits on a GPU come to the host for rows that need more.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import inf, isfinite

from torch import Tensor

from headrace.config import SamplingParams
from headrace.engine.draw import Row, draw_token
from headrace.engine.logits import AnyLargest, HostLogits, Largest, on_host
from headrace.engine.logprobs import explain_not_finite, token_logprobs
from headrace.engine.penalties import TokenCounts, add_bias_, allow_only_, forbid_, penalize_
from headrace.engine.plan import SampledToken, StepResult
from headrace.engine.random_stream import uniform_at
from headrace.errors import KernelError


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingRow:
    """What the sampler needs of the sequence behind one row of logits.

    prompt_token_ids, output_token_ids: may be live lists; read, never written. Between steps they may only grow.
    seed: names the stream of draws; outputs of one request have different seeds.
    mask: the tokens allowed in this step, see `StepPlan.masks`; None allows all.
    """

    seq_id: int
    params: SamplingParams
    seed: int
    prompt_token_ids: Sequence[int]
    output_token_ids: Sequence[int]
    eos_token_ids: Collection[int] = ()
    mask: bytes | None = None
    has_penalties: bool = field(init=False, repr=False)
    is_plain: bool = field(init=False, repr=False)
    """Greedy, and nothing ever changes logits. Known once, asked at every token."""
    _is_plain_in_time: bool = field(init=False, repr=False)
    """So it is as soon as there are min_tokens."""

    def __post_init__(self) -> None:
        params = self.params
        changes_always = bool(params.logit_bias) or params.has_penalties or self.mask is not None
        is_plain_in_time = params.is_greedy and params.logprobs is None and not changes_always
        object.__setattr__(self, "has_penalties", params.has_penalties)
        object.__setattr__(self, "is_plain", is_plain_in_time and not params.min_tokens)
        object.__setattr__(self, "_is_plain_in_time", is_plain_in_time)

    @property
    def must_continue(self) -> bool:
        return len(self.output_token_ids) < self.params.min_tokens

    @property
    def changes_logits(self) -> bool:
        return self.mask is not None or bool(self.params.logit_bias) or self.has_penalties or self.must_continue

    @property
    def uniform(self) -> float:
        """The next token's place in [0, 1): of this seed and position alone."""
        return uniform_at(self.seed, len(self.output_token_ids))

    @property
    def takes_largest(self) -> bool:
        """Nothing is needed but the largest raw logit."""
        return self._is_plain_in_time and len(self.output_token_ids) >= self.params.min_tokens


class Sampler:
    """Owns the token counts of sequences with penalties, and nothing a result depends on: they can be counted again.

    Counts are kept for the sequences of the last call only, so a finished or preempted sequence leaves nothing behind.
    """

    fallback_rows = 0
    """See `ShardedSampler`."""

    def __init__(self) -> None:
        self._counts: dict[int, TokenCounts] = {}

    @property
    def counts(self) -> Mapping[int, TokenCounts]:
        """Of the rows with penalties that `follow` was given last, by sequence id."""
        return self._counts

    def sample(self, logits: Tensor, rows: Sequence[SamplingRow], largest: AnyLargest | None = None) -> StepResult:
        """One token for each row; a row of NaN, +inf or nothing but -inf fails alone.

        Equal logits: the smallest id is taken when greedy, and is the more likely one to top_k and top_p.
        largest: that of each row, if it is known already.

        Shapes:
            logits: [num_rows, vocab_size], any float dtype, any device; computed in float32, never written
        Raises:
            ShapeError: logits and rows do not pair up.
        """
        if largest is not None:
            largest = on_host(largest)
        if largest is not None and not self._counts:
            plain = []
            for row, token_id, logit in zip(rows, largest.token_ids, largest.logits, strict=True):
                if not row.is_plain or not -inf < logit < inf:
                    break
                plain.append(SampledToken(row.seq_id, int(token_id)))
            else:
                return StepResult(tuple(plain), {})
        return self._sample_host(HostLogits(logits), rows, largest)

    def _sample_host(self, host: HostLogits, rows: Sequence[SamplingRow], largest: Largest | None) -> StepResult:
        if largest is None:
            host.check(len(rows))
            candidates: Iterable[tuple[int, float]] = host.largest()
        else:
            candidates = zip(largest.token_ids.tolist(), largest.logits.tolist(), strict=True)
        self.follow(rows)
        host.fetch([index for index, row in enumerate(rows) if not row.takes_largest])
        sampled: list[SampledToken] = []
        failed: dict[int, str] = {}
        for index, (row, (token_id, logit)) in enumerate(zip(rows, candidates, strict=True)):
            if row.takes_largest and isfinite(logit):
                sampled.append(SampledToken(row.seq_id, token_id))
                continue
            try:
                check_finite(logit)
                sampled.append(self.sample_row(host.row(index), row))
            except KernelError as error:
                failed[row.seq_id] = explain_failure(row, error)
        return StepResult(tuple(sampled), failed)

    def whole_rows(self, logits: Tensor) -> Tensor:
        """Logits over the whole vocabulary."""
        return logits

    def follow(self, rows: Sequence[SamplingRow]) -> None:
        """Take in the tokens of these sequences, and forget others."""
        self._counts = {row.seq_id: self._counts_of(row) for row in rows if row.has_penalties}

    def sample_row(self, logits: Row, row: SamplingRow) -> SampledToken:
        """The next token of a sequence that `follow` was given, from finite logits over the whole vocabulary.

        Raises:
            KernelError: what the row changes leaves +inf or no finite logit.
        """
        params = row.params
        allowed = logits
        if row.changes_logits:
            allowed = self.changed(logits, row)
            check_changed_finite(float(allowed.max()))
        token_id = int(allowed.argmax()) if params.is_greedy else draw_token(allowed, params, row.uniform)
        logprobs = () if params.logprobs is None else token_logprobs(logits, token_id, params.logprobs)
        return SampledToken(seq_id=row.seq_id, token_id=token_id, logprobs=logprobs)

    def changed(self, logits: Row, row: SamplingRow, first_id: int = 0) -> Row:
        """A copy with mask, bias, forbidden tokens and penalties; logits may be those of a shard, from first_id on."""
        logits = logits.copy()
        if row.mask is not None:
            allow_only_(logits, row.mask, first_id)
        if row.params.logit_bias:
            add_bias_(logits, row.params.logit_bias, first_id)
        if row.must_continue:
            forbid_(logits, (*row.eos_token_ids, *row.params.stop_token_ids), first_id)
        if row.has_penalties:
            penalize_(logits, row.params, self._counts[row.seq_id], first_id)
        return logits

    def _counts_of(self, row: SamplingRow) -> TokenCounts:
        counts = self._counts.get(row.seq_id)
        if counts is not None and counts.follows(row.prompt_token_ids, row.output_token_ids):
            return counts
        return TokenCounts(row.prompt_token_ids, row.output_token_ids, row.params.repetition_penalty != 1)


def check_finite(largest: float) -> None:
    """
    Raises:
        KernelError: the largest logit of a row is NaN, +inf or -inf, so that it gives no token.
    """
    if not isfinite(largest):
        raise KernelError(explain_not_finite(largest))


def check_changed_finite(largest: float) -> None:
    """`check_finite` of what mask, bias, forbidden tokens and penalties made of a row."""
    if not isfinite(largest):
        raise KernelError(
            explain_not_finite(largest) + " after logit_bias, min_tokens, penalties and structured_outputs"
        )


def explain_failure(row: SamplingRow, error: KernelError) -> str:
    return f"no token for sequence {row.seq_id}: {error}"
