"""A rank's share of the logits, read by the host."""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from headrace.costs.candidates import LARGEST_WORDS, RowRecord
from headrace.engine.candidates import (
    NO_TOKEN,
    Words,
    largest_candidates,
    read_weight_sums,
    scaled_sums,
    write_candidates_,
    write_sum_,
)
from headrace.engine.draw import Row, cumulative_block_sums, exp_weights, first_above, index_in_blocks
from headrace.engine.logits import AnyLargest, HostLogits, Largest, on_host
from headrace.engine.logprobs import sum_of_exp
from headrace.engine.sampler import Sampler, SamplingRow
from headrace.engine.shard import OwnWords, RecordedRows


class _Drawn(NamedTuple):
    """start: of the row's record. weights: exp((logit - shard's largest) / temperature)."""

    row: SamplingRow
    start: int
    weights: Row


class HostShard:
    """A `Shard`. ids: its tokens. whole: knows what rows change in their logits."""

    def __init__(self, ids: range, rank: int, whole: Sampler) -> None:
        self._ids, self._rank, self._whole = ids, rank, whole

    def largest_words(self, logits: Tensor, num_rows: int, largest: AnyLargest | None) -> Tensor:
        found = self._largest(HostLogits(logits), num_rows) if largest is None else on_host(largest)
        return torch.from_numpy(self._words_of(found).reshape(-1))

    def say(self, logits: Tensor, asked: RecordedRows, largest: AnyLargest | None) -> OwnWords:
        host = HostLogits(logits)
        found = self._largest(host, len(asked.rows)) if largest is None else on_host(largest)
        words = np.empty(asked.starts[-1], np.int32)
        words[: asked.starts[0]] = self._words_of(found).reshape(-1)
        if len(self._ids):
            host.fetch([index for index, record in enumerate(asked.records) if record.num_words])
        drawn = []
        for index, (row, record, start) in enumerate(zip(asked.rows, asked.records, asked.starts, strict=False)):
            if not record.num_words:
                continue
            # NaN and +inf fail the row whatever is said of it here.
            is_sound = bool(len(self._ids)) and float(found.logits[index]) < np.inf
            own = host.row(index) if is_sound else np.empty(0, np.float32)
            weights = self._write_record_(words[start : start + record.num_words], row, record, own)
            if record.is_drawn_by_owner:
                drawn.append(_Drawn(row, start, weights))
        return OwnWords(torch.from_numpy(words), partial(self._draw, drawn))

    def _largest(self, host: HostLogits, num_rows: int) -> Largest:
        if not len(self._ids):
            return Largest(np.zeros(num_rows, np.int64), np.full(num_rows, -np.inf, np.float32))
        host.check(num_rows)
        token_ids, logits = zip(*host.largest(), strict=True)
        return Largest(np.array(token_ids, np.int64), np.array(logits, np.float32))

    def _words_of(self, largest: Largest) -> Words:
        """[num_rows, 2]"""
        words = np.empty((len(largest.token_ids), LARGEST_WORDS), np.int32)
        words[:, 0] = largest.token_ids
        words[:, 0] += self._ids.start
        words[:, 1] = np.asarray(largest.logits).view(np.int32)
        return words

    def _write_record_(self, words: Words, row: SamplingRow, record: RowRecord, logits: Row) -> Row:
        """Returns weights exp((logit - largest) / temperature), where there is a sum of them."""
        first_id, end = self._ids.start, 2 * record.num_places
        weights = np.zeros(1, np.float32)
        if record.num_candidates:
            changed = self._whole.changed(logits, row, first_id) if row.changes_logits else logits
            candidates = largest_candidates(changed, first_id, record.num_places)
            write_candidates_(words[:end], candidates)
        if record.has_weight_sum:
            if len(changed) and np.isfinite(candidates.logits[0]):
                weights = exp_weights(changed, row.params.temperature)
            by_block = record.is_drawn_by_owner
            weight_sum = cumulative_block_sums(weights)[-1] if by_block else weights.sum(dtype=np.float64)
            write_sum_(words[end : end + 2], float(weight_sum))
            end += 2
        if record.num_raw_candidates:
            raw = largest_candidates(logits, first_id, record.num_raw_places)
            write_candidates_(words[end:-2], raw)
            is_finite = bool(len(logits)) and bool(np.isfinite(raw.logits[0]))
            write_sum_(words[-2:], sum_of_exp(logits) if is_finite else 0.0)
        return weights

    def _draw(self, drawn: Sequence[_Drawn], everyones: Tensor) -> Tensor:
        words = everyones.numpy()
        tokens = np.full(len(drawn), NO_TOKEN, np.int32)
        for place, (row, start, weights) in enumerate(drawn):
            tokens[place] = self._own_draw(words[:, start:], row, weights)
        return torch.from_numpy(tokens)

    def _own_draw(self, words: Words, row: SamplingRow, weights: Row) -> int:
        """The token, if it is in this rank's shard: the cumulative sum runs through the shards in rank order."""
        largest, weight_sums = read_weight_sums(words)
        if not np.isfinite(largest.max()):
            return NO_TOKEN
        shard_sums = scaled_sums(largest, weight_sums, row.params.temperature)
        sums = np.cumsum(shard_sums)
        target = row.uniform * float(sums[-1])
        owner = first_above(sums, target)
        if owner != self._rank or not shard_sums[owner]:
            return NO_TOKEN
        before = float(sums[owner - 1]) if owner else 0.0
        scale = float(weight_sums[owner] / shard_sums[owner])
        return self._ids.start + index_in_blocks(weights, cumulative_block_sums(weights), (target - before) * scale)
