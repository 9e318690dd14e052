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

What a rank says is found by the host (`HostShard`) or, on a GPU, where the logits lie (`DeviceShard`): what ranks have
said then comes to the host in one copy, which is all that a step waits for.

Where candidates do not hold the answer (a nucleus or a min_p of more tokens, the rank of a token that is not among the
most likely ones, a very large top_k) all ranks gather that row and do as `Sampler` does. Such rows are counted.
"""

from collections.abc import Iterable, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

from headrace.costs.candidates import LARGEST_WORDS, RowRecord, row_record
from headrace.costs.sharding import shard_vocabulary, vocabulary_shard_sizes
from headrace.costs.sites import Site
from headrace.engine.candidates import OUT_OF_MEMORY, Words
from headrace.engine.device_memory import Retrying, call_once
from headrace.engine.device_shard import DeviceShard
from headrace.engine.host_shard import HostShard
from headrace.engine.logits import AnyLargest, HostLogits
from headrace.engine.plan import SampledToken, StepResult
from headrace.engine.sampler import Sampler, SamplingRow, check_finite, explain_failure
from headrace.engine.shard import RecordedRows, Shard
from headrace.engine.shared_step import SharedStep, largest_of_all
from headrace.errors import KernelError, OutOfDeviceMemory
from headrace.kernels import Kernels
from headrace.parallel.group import Group

GATHERED_ROWS = 64
"""Rows of whole logits that exist at once."""


class ShardedSampler:
    """A rank of a group that samples together. Owns what `Sampler` owns, of the same sequences.

    fallback_rows: rows gathered so far because candidates did not suffice.
    retrying: calls what finds no memory once more, after making room: from the first exchange on, what other ranks wait
        for depends on what they have said.
    kernels: those of the device that logits are read on; None reads them by the host.
    """

    def __init__(
        self, group: Group, vocab_size: int, retrying: Retrying = call_once, kernels: Kernels | None = None
    ) -> None:
        self._group = group
        self._retrying = retrying
        self._vocab_size = vocab_size
        self._sizes = vocabulary_shard_sizes(vocab_size, group.world_size)
        self._whole = Sampler()
        ids = shard_vocabulary(vocab_size, group.rank, group.world_size)
        self._shard: Shard = (
            HostShard(ids, group.rank, self._whole)
            if kernels is None
            else DeviceShard(kernels, ids, group.rank, self._whole)
        )
        self.fallback_rows = 0

    def sample(self, logits: Tensor, rows: Sequence[SamplingRow], largest: AnyLargest | None = None) -> StepResult:
        """One token for each row, the same on every rank; see `Sampler.sample`.

        largest: that of each row of this shard, ids counted from the shard's first token, if it is known already.

        Shapes:
            logits: [num_rows, tokens of this rank's shard], computed in float32, never written
        Raises:
            ShapeError: logits and rows do not pair up.
            OutOfDeviceMemory: another rank has said so instead of bringing candidates; there are no tokens.
        """
        if all(row.takes_largest for row in rows):
            return self._sample_largest(self._shard.largest_words(logits, len(rows), largest), rows)
        self._whole.follow(rows)
        asked = RecordedRows(rows, [self._record(row) for row in rows])
        step = SharedStep(asked, self._vocab_size, *self._exchange_all(logits, asked, largest))
        self._sample_gathered(step, logits)
        return step.outcome()

    def whole_rows(self, logits: Tensor) -> Tensor:
        """Rows of this rank's shard, completed by the others' shards: [num_rows, vocab_size] float32."""
        own = self._retrying(lambda: logits.float().contiguous())
        parts = self._retrying(lambda: self._group.all_gather(own, Site.LOGITS, self._sizes))
        return self._retrying(lambda: torch.cat(parts, dim=-1))

    def _record(self, row: SamplingRow) -> RowRecord:
        return row_record(
            row.params,
            changes_logits=row.changes_logits,
            vocab_size=self._vocab_size,
            largest_shard=self._sizes[0],
        )

    def _exchange(self, words: Tensor) -> Tensor:
        """[world_size, num_words]. Words travel as float32, which every transport carries and none changes."""
        brought = self._retrying(lambda: self._group.all_gather(words.view(torch.float32), Site.CANDIDATES))
        return self._retrying(lambda: torch.stack(brought)).view(torch.int32)

    def _exchange_all(self, logits: Tensor, asked: RecordedRows, largest: AnyLargest | None) -> tuple[Words, Words]:
        """What all ranks say of the rows, and the draws of those that are drawn by an owner.

        Draws are made in any case: whether a rank has had no memory is known to the host alone, which waits for both.

        Shapes: [world_size, num_words], [world_size, num_drawn]
        """
        own = self._shard.say(logits, asked, largest)
        brought = [self._exchange(own.words)]
        if asked.drawn:
            draws = self._retrying(lambda: own.draw(brought[0]))
            brought.append(self._exchange(draws))
        found = self._read(self._retrying(lambda: torch.cat(brought, dim=1)))
        return found[:, : len(own.words)], found[:, len(own.words) :]

    def _read(self, everyones: Tensor) -> Words:
        """
        Raises:
            OutOfDeviceMemory: see `sample`.
        """
        words: Words = everyones.cpu().numpy()
        [without] = np.nonzero(words[:, 0] == OUT_OF_MEMORY)
        if len(without):
            raise OutOfDeviceMemory(f"a step does not fit the memory of rank {without[0]} of {self._group.name}")
        return words

    def _sample_largest(self, own: Tensor, rows: Sequence[SamplingRow]) -> StepResult:
        words = self._read(self._exchange(own))
        token_ids, logits = largest_of_all(words.reshape(-1, len(rows), LARGEST_WORDS))
        if np.isfinite(logits).all():
            drawn = zip(rows, token_ids.tolist(), strict=True)
            return StepResult(tuple([SampledToken(row.seq_id, token_id) for row, token_id in drawn]), {})
        sampled, failed = [], {}
        for row, token_id, logit in zip(rows, token_ids.tolist(), logits.tolist(), strict=True):
            try:
                check_finite(logit)
                sampled.append(SampledToken(row.seq_id, token_id))
            except KernelError as error:
                failed[row.seq_id] = explain_failure(row, error)
        return StepResult(tuple(sampled), failed)

    def _sample_gathered(self, step: SharedStep, logits: Tensor) -> None:
        self.fallback_rows += len(step.whole)
        for indices in _in_parts(step.whole, GATHERED_ROWS):
            own = self._retrying(partial(logits.__getitem__, indices))
            host = HostLogits(self.whole_rows(own))
            self._retrying(partial(host.fetch, range(len(indices))))
            step.sample_whole(self._whole, host, enumerate(indices))


def _in_parts(indices: Sequence[int], size: int) -> Iterable[list[int]]:
    return (list(indices[start : start + size]) for start in range(0, len(indices), size))
