"""What follows for a step's rows from what all ranks have said of their shares of the logits, the same on each."""

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from headrace.costs.candidates import LARGEST_WORDS
from headrace.engine.candidates import Shares, Words, read_shares, scaled_sums
from headrace.engine.draw import Row, draw_among
from headrace.engine.logprobs import logprobs_among
from headrace.engine.plan import SampledToken
from headrace.engine.row_outcomes import RowOutcomes
from headrace.engine.sampler import SamplingRow, check_changed_finite, check_finite
from headrace.engine.shard import RecordedRows
from headrace.errors import KernelError


class SharedStep(RowOutcomes):
    """The rows of `asked`, as far as candidates, sums and draws tell.

    Shapes: words [world_size, num_words], draws [world_size, num_drawn]; see `OwnWords`
    """

    def __init__(self, asked: RecordedRows, vocab_size: int, words: Words, draws: Words) -> None:
        super().__init__(asked.rows)
        self._asked, self._vocab_size = asked, vocab_size
        self._decide(words, dict(zip(asked.drawn, draws.max(axis=0).tolist(), strict=True)))

    def _decide(self, everyones: Words, drawn: Mapping[int, int]) -> None:
        """drawn: by row, from the rank that has the token."""
        asked = self._asked
        header = everyones[:, : asked.starts[0]].reshape(-1, len(asked.rows), LARGEST_WORDS)
        token_ids, logits = largest_of_all(header)
        raw_largest = np.ascontiguousarray(header[:, :, 1]).view(np.float32)
        for index, (row, record, start) in enumerate(zip(asked.rows, asked.records, asked.starts, strict=False)):
            try:
                check_finite(float(logits[index]))
                if record.is_gathered:
                    self.whole.append(index)
                    continue
                words = everyones[:, start : start + record.num_words]
                shares = read_shares(words, record, raw_largest[:, index])
                if record.num_candidates:
                    check_changed_finite(float(shares.candidates.logits[0]))
                token_id = drawn[index] if record.is_drawn_by_owner else self._token(row, shares, int(token_ids[index]))
                self._score(index, shares, token_id)
            except KernelError as error:
                self.fail(index, error)

    def _token(self, row: SamplingRow, shares: Shares, largest_id: int) -> int | None:
        """Of a row that is not drawn by an owner; None if the candidates do not tell."""
        params, (token_ids, logits) = row.params, shares.candidates
        if params.is_greedy:
            return int(token_ids[0]) if len(token_ids) else largest_id
        totals = []
        if params.top_p < 1:
            totals = [float(scaled_sums(shares.largest, shares.weight_sums, params.temperature).sum())]
        return draw_among(token_ids, logits, totals, self._vocab_size, params, row.uniform)

    def _score(self, index: int, shares: Shares, token_id: int | None) -> None:
        """Take a token with its log probabilities, where asked for.

        One that no rank has drawn is none: rounding may make of each rank that another one has it.
        """
        row = self.rows[index]
        if token_id is None or token_id < 0:
            self.whole.append(index)
        elif row.params.logprobs is None:
            self.sampled[index] = SampledToken(row.seq_id, token_id)
        else:
            logprobs = logprobs_among(*shares.raw_candidates, shares.raw_lse, token_id, row.params.logprobs)
            if logprobs is None:
                self.whole.append(index)
            else:
                self.sampled[index] = SampledToken(row.seq_id, token_id, logprobs)


def largest_of_all(words: Words) -> tuple[NDArray[np.int32], Row]:
    """Of each row the first id of its largest logit, and that logit; NaN counts as largest.

    Shapes: words [world_size, num_rows, 2]; returns [num_rows] each
    """
    logits = np.ascontiguousarray(words[:, :, 1]).view(np.float32)
    owners = logits.argmax(axis=0)  # the first of equals, whose ids are the smallest
    rows = np.arange(words.shape[1])
    return words[owners, rows, 0], logits[owners, rows]
