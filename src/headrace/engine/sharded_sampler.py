"""Picks tokens from logits whose vocabulary is cut among ranks, without gathering them.

Every rank holds the same sequences and calls with the same rows. Each changes the logits of its own shard, says of each
row what the row's parameters ask for (`costs.candidates.RowRecord`), and decides from what all have said, so that all
take the same token. Tokens are those of `Sampler` on whole rows:

- greedy, top_k, min_p: the same token. Candidates hold every token that may be drawn.
- top_p: the same but for the total over the vocabulary, which is added up by shard; it differs in the last digits of
  float32, and with it a token whose cumulative probability ends within some 1e-7 of top_p.
- drawn from the whole vocabulary: the same but for the rounding of the cumulative sum, some 1e-7 of it. The rank whose
  share holds the draw finds the token within its shard and tells the others.
- log probabilities: those of the same tokens with the same ranks, their sums added up by shard.

Where candidates do not hold the answer (a nucleus or a min_p of more tokens, the rank of a token that is not among the
most likely ones, a very large top_k) all ranks gather that row and do as `Sampler` does. Such rows are counted.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from headrace.costs.candidates import LARGEST_WORDS, RowRecord, row_record
from headrace.costs.sharding import shard_vocabulary, vocabulary_shard_sizes
from headrace.costs.sites import Site
from headrace.engine.candidates import (
    OUT_OF_MEMORY,
    Shares,
    Words,
    largest_candidates,
    read_shares,
    scaled_sums,
    write_candidates_,
    write_sum_,
)
from headrace.engine.device_memory import Retrying, call_once
from headrace.engine.draw import (
    Row,
    cumulative_block_sums,
    draw_from_nucleus,
    draw_from_top_k,
    exp_weights,
    first_above,
    index_in_blocks,
    inverse_cdf_in_blocks,
)
from headrace.engine.logits import HostLogits, Largest
from headrace.engine.logprobs import logprobs_among, sum_of_exp
from headrace.engine.plan import SampledToken
from headrace.engine.random_stream import uniform_at
from headrace.engine.sampler import (
    SampleOutcome,
    Sampler,
    SamplingRow,
    check_changed_finite,
    check_finite,
    explain_failure,
)
from headrace.errors import KernelError, OutOfDeviceMemory
from headrace.parallel.group import Group

GATHERED_ROWS = 64
"""Rows of whole logits that exist at once."""


@dataclass(kw_only=True)
class _Step:
    """What is known of a step's rows, by their index.

    weights: exp((logit - shard's largest) / temperature) of rows drawn from the whole vocabulary.
    """

    rows: Sequence[SamplingRow]
    records: Sequence[RowRecord]
    weights: dict[int, Row] = field(default_factory=dict)
    shares: dict[int, Shares] = field(default_factory=dict)
    tokens: dict[int, int] = field(default_factory=dict)
    sampled: dict[int, SampledToken] = field(default_factory=dict)
    failed: dict[int, str] = field(default_factory=dict)
    gathered: list[int] = field(default_factory=list)

    def fail(self, index: int, error: KernelError) -> None:
        self.failed[index] = explain_failure(self.rows[index], error)

    def outcome(self) -> SampleOutcome:
        failed: Mapping[int, str] = {self.rows[i].seq_id: reason for i, reason in sorted(self.failed.items())}
        return SampleOutcome(tuple(token for _, token in sorted(self.sampled.items())), failed)


class ShardedSampler:
    """A rank of a group that samples together. Owns what `Sampler` owns, of the same sequences.

    fallback_rows: rows gathered so far because candidates did not suffice.
    retrying: calls what finds no memory once more, after making room: from the first exchange on, what other ranks wait
        for depends on what they have said.
    """

    def __init__(self, group: Group, vocab_size: int, retrying: Retrying = call_once) -> None:
        self._group = group
        self._retrying = retrying
        self._vocab_size = vocab_size
        self._sizes = vocabulary_shard_sizes(vocab_size, group.world_size)
        self._shard = shard_vocabulary(vocab_size, group.rank, group.world_size)
        self._whole = Sampler()
        self.fallback_rows = 0

    def sample(self, logits: Tensor, rows: Sequence[SamplingRow], largest: Largest | None = None) -> SampleOutcome:
        """One token for each row, the same on every rank; see `Sampler.sample`.

        largest: that of each row of this shard, ids counted from the shard's first token, if it is known already.

        Shapes:
            logits: [num_rows, tokens of this rank's shard], computed in float32, never written
        Raises:
            ShapeError: logits and rows do not pair up.
            OutOfDeviceMemory: another rank has said so instead of bringing candidates; there are no tokens.
        """
        host = HostLogits(logits)
        mine = self._own_largest(host, len(rows)) if largest is None else largest
        if all(row.takes_largest for row in rows):
            return self._sample_largest(mine, rows, logits.device)
        self._whole.follow(rows)
        step = _Step(rows=rows, records=[self._record(row) for row in rows])
        own = np.concatenate([self._largest_words(mine).reshape(-1), self._own_words(step, host, mine)])
        everyones = self._exchange_candidates(own, logits.device)
        self._decide(step, everyones)
        self._draw_by_owner(step, logits.device)
        self._score(step)
        self._sample_gathered(step, logits)
        return step.outcome()

    def whole_rows(self, logits: Tensor) -> Tensor:
        """Rows of this rank's shard, completed by the others' shards: [num_rows, vocab_size] float32."""
        own = self._retrying(lambda: logits.float().contiguous())
        parts = self._retrying(lambda: self._group.all_gather(own, Site.LOGITS, self._sizes))
        return self._retrying(lambda: torch.cat(parts, dim=-1))

    def _own_largest(self, host: HostLogits, num_rows: int) -> Largest:
        if not len(self._shard):
            return Largest(np.zeros(num_rows, np.int64), np.full(num_rows, -np.inf, np.float32))
        host.check(num_rows)
        token_ids, logits = zip(*host.largest(), strict=True)
        return Largest(np.array(token_ids, np.int64), np.array(logits, np.float32))

    def _largest_words(self, largest: Largest) -> Words:
        """[num_rows, 2]"""
        words = np.empty((len(largest.token_ids), LARGEST_WORDS), np.int32)
        words[:, 0] = largest.token_ids
        words[:, 0] += self._shard.start
        words[:, 1] = np.asarray(largest.logits).view(np.int32)
        return words

    def _exchange(self, words: Words, device: torch.device) -> Words:
        """[world_size, *words.shape]. Words travel as float32, which every transport carries and none changes."""
        group = self._group
        brought = self._retrying(
            lambda: group.all_gather(torch.from_numpy(words.reshape(-1).view(np.float32)).to(device), Site.CANDIDATES)
        )
        found: Words = self._retrying(lambda: torch.stack(brought).cpu()).numpy().view(np.int32)
        return found.reshape(-1, *words.shape)

    def _exchange_candidates(self, words: Words, device: torch.device) -> Words:
        """
        Raises:
            OutOfDeviceMemory: see `sample`.
        """
        everyones = self._exchange(words, device)
        [without] = np.nonzero(everyones.reshape(len(everyones), -1)[:, 0] == OUT_OF_MEMORY)
        if len(without):
            raise OutOfDeviceMemory(f"a step does not fit the memory of rank {without[0]} of {self._group.name}")
        return everyones

    def _sample_largest(self, mine: Largest, rows: Sequence[SamplingRow], device: torch.device) -> SampleOutcome:
        token_ids, logits = _largest_of_all(self._exchange_candidates(self._largest_words(mine), device))
        if np.isfinite(logits).all():
            drawn = zip(rows, token_ids.tolist(), strict=True)
            return SampleOutcome(tuple([SampledToken(row.seq_id, token_id) for row, token_id in drawn]), {})
        sampled, failed = [], {}
        for row, token_id, logit in zip(rows, token_ids.tolist(), logits.tolist(), strict=True):
            try:
                check_finite(logit)
                sampled.append(SampledToken(row.seq_id, token_id))
            except KernelError as error:
                failed[row.seq_id] = explain_failure(row, error)
        return SampleOutcome(tuple(sampled), failed)

    def _record(self, row: SamplingRow) -> RowRecord:
        return row_record(
            row.params,
            changes_logits=row.changes_logits,
            vocab_size=self._vocab_size,
            largest_shard=self._sizes[0],
        )

    def _own_words(self, step: _Step, host: HostLogits, mine: Largest) -> Words:
        """The records of all rows, end to end, without their first words."""
        words = np.empty(sum(record.num_words for record in step.records), np.int32)
        if len(self._shard):
            host.fetch([index for index, record in enumerate(step.records) if record.num_words])
        start = 0
        for index, record in enumerate(step.records):
            own = words[start : start + record.num_words]
            start += record.num_words
            if not record.num_words:
                continue
            largest = float(mine.logits[index])
            # NaN and +inf fail the row whatever is said of it here.
            is_sound = bool(len(self._shard)) and largest < np.inf
            self._write_record_(own, step, index, host.row(index) if is_sound else np.empty(0, np.float32))
        return words

    def _write_record_(self, words: Words, step: _Step, index: int, logits: Row) -> None:
        row, record = step.rows[index], step.records[index]
        first_id = self._shard.start
        end = 2 * record.num_places
        if record.num_candidates:
            changed = self._whole.changed(logits, row, first_id) if row.changes_logits else logits
            candidates = largest_candidates(changed, first_id, record.num_places)
            write_candidates_(words[:end], candidates)
        if record.has_weight_sum:
            is_finite = bool(len(changed)) and bool(np.isfinite(candidates.logits[0]))
            weights = exp_weights(changed, row.params.temperature) if is_finite else np.zeros(1, np.float32)
            if record.is_drawn_by_owner:
                step.weights[index] = weights
                weight_sum = float(cumulative_block_sums(weights)[-1])
            else:
                weight_sum = float(weights.sum(dtype=np.float64))
            write_sum_(words[end : end + 2], weight_sum)
            end += 2
        if record.num_raw_candidates:
            raw = largest_candidates(logits, first_id, record.num_raw_places)
            write_candidates_(words[end:-2], raw)
            is_finite = bool(len(logits)) and bool(np.isfinite(raw.logits[0]))
            write_sum_(words[-2:], sum_of_exp(logits) if is_finite else 0.0)

    def _decide(self, step: _Step, everyones: Words) -> None:
        """Tokens that follow from what the ranks have said, and rows that fail, are gathered or drawn by an owner."""
        num_rows = len(step.rows)
        header = everyones[:, : LARGEST_WORDS * num_rows].reshape(-1, num_rows, LARGEST_WORDS)
        token_ids, logits = _largest_of_all(header)
        raw_largest = np.ascontiguousarray(header[:, :, 1]).view(np.float32)
        start = LARGEST_WORDS * num_rows
        for index, record in enumerate(step.records):
            words = everyones[:, start : start + record.num_words]
            start += record.num_words
            try:
                check_finite(float(logits[index]))
                if record.is_gathered:
                    step.gathered.append(index)
                    continue
                shares = step.shares[index] = read_shares(words, record, raw_largest[:, index])
                if record.num_candidates:
                    check_changed_finite(float(shares.candidates.logits[0]))
                if not record.is_drawn_by_owner:
                    token_id = self._token(step, index, int(token_ids[index]))
                    if token_id is None:
                        step.gathered.append(index)
                    else:
                        step.tokens[index] = token_id
            except KernelError as error:
                step.fail(index, error)

    def _token(self, step: _Step, index: int, largest_id: int) -> int | None:
        """The token of a row that is not drawn by an owner; None if the candidates do not tell."""
        row, shares = step.rows[index], step.shares[index]
        params, (token_ids, logits) = row.params, shares.candidates
        if params.is_greedy:
            return int(token_ids[0]) if len(token_ids) else largest_id
        uniform = uniform_at(row.seed, len(row.output_token_ids))
        if 0 < params.top_k < self._vocab_size:
            return draw_from_top_k(token_ids, logits, params, uniform)
        weights = exp_weights(logits, params.temperature)
        if params.top_p < 1:
            total = float(scaled_sums(shares.largest, shares.weight_sums, params.temperature).sum())
            return draw_from_nucleus(token_ids, weights, total, params, uniform)
        if len(token_ids) < self._vocab_size and not weights[-1] < params.min_p:
            return None
        # All others have a weight of 0, so that the sums are the same, bit for bit, as with a whole row.
        all_weights = np.zeros(self._vocab_size, np.float32)
        all_weights[token_ids] = np.where(weights < params.min_p, 0, weights)
        return inverse_cdf_in_blocks(all_weights, uniform)

    def _draw_by_owner(self, step: _Step, device: torch.device) -> None:
        """Rows drawn from the whole vocabulary: the rank that has the token tells it."""
        drawn = [index for index, record in enumerate(step.records) if record.is_drawn_by_owner]
        if not drawn:
            return
        words = np.full(len(drawn), -1, np.int32)
        for place, index in enumerate(drawn):
            if index not in step.failed:
                token_id = self._own_draw(step, index)
                words[place] = -1 if token_id is None else token_id
        for index, token_id in zip(drawn, self._exchange(words, device).max(axis=0).tolist(), strict=True):
            if index not in step.failed:
                step.tokens[index] = token_id

    def _own_draw(self, step: _Step, index: int) -> int | None:
        """The token, if it is in this rank's shard: the cumulative sum runs through the shards in rank order."""
        row, shares = step.rows[index], step.shares[index]
        shard_sums = scaled_sums(shares.largest, shares.weight_sums, row.params.temperature)
        sums = np.cumsum(shard_sums)
        target = uniform_at(row.seed, len(row.output_token_ids)) * float(sums[-1])
        owner = first_above(sums, target)
        if owner != self._group.rank:
            return None
        before = float(sums[owner - 1]) if owner else 0.0
        scale = float(shares.weight_sums[owner] / shard_sums[owner])
        weights = step.weights[index]
        return self._shard.start + index_in_blocks(weights, cumulative_block_sums(weights), (target - before) * scale)

    def _score(self, step: _Step) -> None:
        """Log probabilities of the tokens found so far, where asked for."""
        for index, token_id in step.tokens.items():
            row = step.rows[index]
            if row.params.logprobs is None:
                step.sampled[index] = SampledToken(row.seq_id, token_id)
                continue
            shares = step.shares[index]
            logprobs = logprobs_among(*shares.raw_candidates, shares.raw_lse, token_id, row.params.logprobs)
            if logprobs is None:
                step.gathered.append(index)
            else:
                step.sampled[index] = SampledToken(row.seq_id, token_id, logprobs)

    def _rows(self, logits: Tensor, indices: Sequence[int]) -> Tensor:
        return self._retrying(lambda: logits[indices])

    def _sample_gathered(self, step: _Step, logits: Tensor) -> None:
        self.fallback_rows += len(step.gathered)
        for indices in _in_parts(step.gathered, GATHERED_ROWS):
            host = HostLogits(self.whole_rows(self._rows(logits, indices)))
            self._retrying(partial(host.fetch, range(len(indices))))
            for place, index in enumerate(indices):
                try:
                    step.sampled[index] = self._whole.sample_row(host.row(place), step.rows[index])
                except KernelError as error:
                    step.fail(index, error)


def _largest_of_all(words: Words) -> tuple[NDArray[np.int32], Row]:
    """Of each row the first id of its largest logit, and that logit; NaN counts as largest.

    Shapes: words [world_size, num_rows, 2]; returns [num_rows] each
    """
    logits = np.ascontiguousarray(words[:, :, 1]).view(np.float32)
    owners = logits.argmax(axis=0)  # the first of equals, whose ids are the smallest
    rows = np.arange(words.shape[1])
    return words[owners, rows, 0], logits[owners, rows]


def _in_parts(indices: Sequence[int], size: int) -> Iterable[list[int]]:
    return (list(indices[start : start + size]) for start in range(0, len(indices), size))
