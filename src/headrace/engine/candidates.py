"""What a rank says of its shard of a row of logits, and what the ranks' shares say together.

The words and their order are those of `costs.candidates.RowRecord`.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from headrace.costs.candidates import RowRecord
from headrace.engine.draw import Ids, Row, largest_tokens

Words = NDArray[np.int32]
Sums = NDArray[np.float64]

OUT_OF_MEMORY = -2
"""In the place of a step's first token id: the rank that brings it has no candidates, and the step is undone."""

NO_TOKEN = -1
"""In a place without a candidate, and in that of a draw which another rank makes."""


class Candidates(NamedTuple):
    """Some of the largest logits with their token ids, largest first, equals by id."""

    token_ids: Ids
    logits: Row


_NO_CANDIDATES = Candidates(np.empty(0, np.int64), np.empty(0, np.float32))


@dataclass(frozen=True, kw_only=True)
class Shares:
    """What the ranks say of one row.

    candidates, raw_candidates: those of the whole vocabulary, of changed and of raw logits.
    largest, weight_sums: each shard's largest changed logit, and the sum of exp((logit - largest) / temperature).
    raw_largest, raw_sums: the same of raw logits, at temperature 1.

    Shapes: largest, weight_sums, raw_largest, raw_sums [world_size]
    """

    candidates: Candidates
    raw_candidates: Candidates
    largest: Row
    weight_sums: Sums
    raw_largest: Row
    raw_sums: Sums

    @property
    def raw_lse(self) -> float:
        return float(self.raw_largest.max()) + math.log(float(scaled_sums(self.raw_largest, self.raw_sums, 1.0).sum()))


def scaled_sums(largest: Row, sums: Sums, temperature: float) -> Sums:
    """The shards' sums in a common scale: sum * exp((shard's largest - largest of all) / temperature).

    The largest of all must be finite.
    """
    gaps = largest.astype(np.float64) - float(largest.max())
    with np.errstate(under="ignore"):
        scaled: Sums = sums * np.exp(gaps / temperature)
    return scaled


def largest_candidates(logits: Row, first_id: int, num_candidates: int) -> Candidates:
    """Of a shard whose first token is first_id; fewer if it has fewer tokens."""
    indices = (
        logits.argmax(0, keepdims=True)
        if num_candidates == 1 and len(logits)
        else largest_tokens(logits, num_candidates)
    )
    return Candidates(indices + first_id, logits[indices])


def write_candidates_(words: Words, candidates: Candidates) -> None:
    """Fill half of the words with ids, the other half with logits; places left over are empty."""
    num_places, num_candidates = len(words) // 2, len(candidates.token_ids)
    words[:num_candidates] = candidates.token_ids
    words[num_candidates:num_places] = NO_TOKEN
    logits = words[num_places:].view(np.float32)
    logits[:num_candidates] = candidates.logits
    logits[num_candidates:] = -np.inf


def write_sum_(words: Words, value: float) -> None:
    words[:] = np.float64(value).reshape(1).view(np.int32)


def read_weight_sums(words: Words) -> tuple[Row, Sums]:
    """Of a row drawn by an owner, whose record begins the words: each shard's largest logit and its sum of weights.

    Shapes: words [world_size, at least a record]; returns [world_size] each
    """
    return _as_float32(words[:, 1]), _as_float64(words[:, 2:4])


def read_shares(words: Words, record: RowRecord, raw_largest: Row) -> Shares:
    """
    Shapes:
        words:       [world_size, record.num_words]
        raw_largest: [world_size]
    """
    ids_end, end = record.num_places, 2 * record.num_places
    parts = words[:, :ids_end], _as_float32(words[:, ids_end:end])
    weight_sums, raw_sums = np.zeros(len(words)), np.zeros(len(words))
    if record.has_weight_sum:
        weight_sums = _as_float64(words[:, end : end + 2])
        end += 2
    raw_ids_end, raw_end = end + record.num_raw_places, end + 2 * record.num_raw_places
    raw_parts = words[:, end:raw_ids_end], _as_float32(words[:, raw_ids_end:raw_end])
    if record.num_raw_candidates:
        raw_sums = _as_float64(words[:, raw_end : raw_end + 2])
    return Shares(
        candidates=_merge(*parts, record.num_candidates),
        raw_candidates=_merge(*raw_parts, record.num_raw_candidates),
        largest=parts[1][:, 0] if record.num_places else raw_largest,
        weight_sums=weight_sums,
        raw_largest=raw_largest,
        raw_sums=raw_sums,
    )


def _merge(token_ids: Words, logits: Row, num_candidates: int) -> Candidates:
    """The largest of all shards' candidates. Shards lie in the order of their ids, so that a stable sort keeps equals
    in that order too."""
    if not token_ids.shape[1]:
        return _NO_CANDIDATES
    flat_ids, flat_logits = token_ids.reshape(-1), logits.reshape(-1)
    order = np.argsort(-flat_logits, kind="stable")
    order = order[flat_ids[order] != NO_TOKEN][:num_candidates]
    return Candidates(flat_ids[order].astype(np.int64), flat_logits[order])


def _as_float32(words: Words) -> Row:
    return np.ascontiguousarray(words).view(np.float32)


def _as_float64(words: Words) -> Sums:
    return np.ascontiguousarray(words).view(np.float64).reshape(-1)
