"""What ranks exchange to sample from sharded logits: the layout of their messages, and so the bytes.

A step that samples has one all-gather at `Site.CANDIDATES`, in which each rank brings a record for each row, of one
size on every rank. Words are 4 bytes: token ids are int32, logits float32, sums float64 in two words. First come two
words for every row, the id and the value of the shard's largest raw logit; then what the rows' parameters ask for, row
by row (`RowRecord`). A shard that has fewer tokens than a record has places leaves the last ones empty: id -1, -inf.

Steps with rows drawn from the whole vocabulary have a second one, of a word for each such row: the token, from the rank
that has it. Where candidates do not suffice, all ranks gather the row's logits at `Site.LOGITS`.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

from headrace.config import SamplingParams

WORD_BYTES = 4
LARGEST_WORDS = 2
"""Of each row, whatever it asks for: id and value of its largest logit."""

NUCLEUS_CANDIDATES = 256
"""Tokens that nearly always hold top_p of a language model's probability."""

MAX_TOP_K_CANDIDATES = 1024
"""Rows with a larger top_k are gathered: their candidates would not be much smaller than the logits."""

LOGPROB_CANDIDATES = 64
"""Raw logits brought where log probabilities are asked for, so that most tokens that are drawn are among them."""


@dataclass(frozen=True, kw_only=True)
class RowRecord:
    """What each rank brings for one row beside its largest logit, in this order.

    num_candidates: of the largest logits after mask, bias, forbidden tokens and penalties, ids first.
    has_weight_sum: sum(exp((logit - largest) / temperature)) of those logits over the shard.
    num_raw_candidates: of the largest raw logits, ids first, and then sum(exp(logit - largest)) of raw logits.
    is_drawn_by_owner: all tokens may be drawn; the rank whose share of the sum holds the draw finds the token.
    is_gathered: no such record could suffice.

    Numbers of candidates are how many are wanted of the whole vocabulary. No rank brings more of them than
    largest_shard, the tokens of the rank that has most.
    """

    largest_shard: int
    num_candidates: int = 0
    has_weight_sum: bool = False
    num_raw_candidates: int = 0
    is_drawn_by_owner: bool = False
    is_gathered: bool = False

    @cached_property
    def num_places(self) -> int:
        return min(self.num_candidates, self.largest_shard)

    @cached_property
    def num_raw_places(self) -> int:
        return min(self.num_raw_candidates, self.largest_shard)

    @cached_property
    def num_words(self) -> int:
        """Beside the LARGEST_WORDS."""
        raw_words = 2 * self.num_raw_places + 2 if self.num_raw_candidates else 0
        return 2 * self.num_places + 2 * self.has_weight_sum + raw_words


def row_record(params: SamplingParams, *, changes_logits: bool, vocab_size: int, largest_shard: int) -> RowRecord:
    """The record of a row with these parameters.

    changes_logits: a mask, bias, penalties, or tokens forbidden for now; greedy rows without any need no candidates.
    """
    num_raw = max(params.logprobs, LOGPROB_CANDIDATES) if params.logprobs is not None else 0

    def record(num_candidates: int, *, has_weight_sum: bool = False, is_drawn_by_owner: bool = False) -> RowRecord:
        return RowRecord(
            largest_shard=largest_shard,
            num_candidates=num_candidates,
            has_weight_sum=has_weight_sum,
            num_raw_candidates=num_raw,
            is_drawn_by_owner=is_drawn_by_owner,
        )

    if params.is_greedy:
        return record(int(changes_logits))
    if 0 < params.top_k < vocab_size:
        is_gathered = params.top_k > MAX_TOP_K_CANDIDATES
        return RowRecord(largest_shard=largest_shard, is_gathered=True) if is_gathered else record(params.top_k)
    if params.top_p < 1 or params.min_p > 0:
        return record(NUCLEUS_CANDIDATES, has_weight_sum=params.top_p < 1)
    return record(1, has_weight_sum=True, is_drawn_by_owner=True)


def largest_candidates_payload_bytes(num_rows: int, largest_shard: int) -> int:
    """`candidates_payload_bytes` of so many rows, whatever they ask for."""
    record = RowRecord(
        largest_shard=largest_shard,
        num_candidates=MAX_TOP_K_CANDIDATES,
        has_weight_sum=True,
        num_raw_candidates=LOGPROB_CANDIDATES,
    )
    return num_rows * candidates_payload_bytes([record])


def candidates_payload_bytes(records: Iterable[RowRecord]) -> int:
    """Bytes each rank brings to a step's first all-gather at `Site.CANDIDATES`."""
    return WORD_BYTES * sum(LARGEST_WORDS + record.num_words for record in records)


def draws_payload_bytes(records: Iterable[RowRecord]) -> int:
    """Bytes each rank brings to the second one, which a step has if this is not 0."""
    return WORD_BYTES * sum(record.is_drawn_by_owner for record in records)
