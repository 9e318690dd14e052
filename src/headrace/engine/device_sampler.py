"""Picks tokens from logits on a GPU, of which as little as possible travels to the host.

A row of 128,256 logits is 500 KB. Instead of it the host gets the row's most likely tokens, sums over all of it, or the
token itself, for all rows in one copy. The token is the one that `Sampler` draws from the whole row:

- top_k, min_p: candidates hold every token that may be drawn, and the host draws among them as it does otherwise.
- top_p: so it does there, but for the total over the vocabulary, which the device adds up.
- drawn from the whole vocabulary: the device finds the token by its own cumulative sum.

The last two differ from the host's arithmetic by rounding, so they are asked for twice, at both ends of a margin that
is wider than that. Where the answers differ, and where candidates do not hold the answer, the row is copied to the host
as a whole. Such rows are counted. Log probabilities differ in the last digits of float32.

Rows whose requests change logits are changed on the device (`device_logits`), and their tokens asked of those.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from headrace.costs.candidates import row_record
from headrace.engine.device_answers import RELATIVE_MARGIN, Answers, Question, ask, read_answers
from headrace.engine.device_logits import changed_logits
from headrace.engine.draw import draw_among
from headrace.engine.logits import AnyLargest, DeviceLargest, HostLogits, Largest, on_host
from headrace.engine.logprobs import logprobs_among, logprobs_beside
from headrace.engine.plan import SampledToken, StepResult, TokenLogprob
from headrace.engine.row_outcomes import RowOutcomes
from headrace.engine.sampler import Sampler, SamplingRow, check_changed_finite, check_finite
from headrace.engine.transfers import download, upload
from headrace.errors import KernelError
from headrace.kernels import Kernels

_MAX_ROWS = 32
"""Handled at once: sums in float64 take 8 bytes for each logit."""


@dataclass(frozen=True, kw_only=True)
class _Part:
    """Questions asked together, of what tokens are drawn from and of raw logits, which may be the same."""

    questions: Sequence[Question]
    answers: Answers
    raw: Answers


class DeviceSampler(Sampler):
    """Owns what `Sampler` owns.

    copied_rows: rows brought to the host as a whole so far.
    """

    def __init__(self, kernels: Kernels) -> None:
        super().__init__()
        self._kernels = kernels
        self.copied_rows = 0

    def sample(self, logits: Tensor, rows: Sequence[SamplingRow], largest: AnyLargest | None = None) -> StepResult:
        """See `Sampler.sample`.

        Shapes:
            logits: [num_rows, vocab_size] float32, on the kernels' device
        """
        host = HostLogits(logits)
        if largest is None:
            host.check(len(rows))
            largest = DeviceLargest(*self._kernels.argmax(logits))
        self.follow(rows)
        questions = list(_questions(rows, logits.shape[1]))
        found, parts = self._ask_all(logits, questions, largest)
        outcomes, drawn = RowOutcomes(rows), dict[int, int]()
        asked = {question.row_index for question in questions}
        for index, (row, token_id, logit) in enumerate(zip(rows, *found, strict=True)):
            try:
                check_finite(float(logit))
                if row.takes_largest:
                    drawn[index] = int(token_id)
                elif index not in asked:
                    outcomes.whole.append(index)
            except KernelError as error:
                outcomes.fail(index, error)
        for part in parts:
            _draw(part, found, logits.shape[1], outcomes, drawn)
        outcomes.sampled.update(_scored(logits, rows, drawn, parts))
        self.copied_rows += len(outcomes.whole)
        host.fetch(outcomes.whole)
        outcomes.sample_whole(self, host, zip(outcomes.whole, outcomes.whole, strict=True))
        return outcomes.outcome()

    def _ask_all(
        self, logits: Tensor, questions: Sequence[Question], largest: AnyLargest
    ) -> tuple[Largest, list[_Part]]:
        """The largest logits and all answers, in one copy from the device."""
        if not questions:
            return on_host(largest), []
        parts = list(_in_parts(questions))
        asked = [self._ask(logits, part) for part in parts]
        own = [part.view(torch.int32) for part in largest] if isinstance(largest, DeviceLargest) else []
        arrays = download([*own, *(words for both in asked for words in both)])
        if own:
            largest = Largest(arrays[0].view(np.int64), arrays[1].view(np.float32))
        answers = map(read_answers, arrays[len(own) :])
        read = []
        for part, both in zip(parts, asked, strict=True):
            first, *raw = [next(answers) for _ in both]
            read.append(_Part(questions=part, answers=first, raw=raw[0] if raw else first))
        return on_host(largest), read

    def _ask(self, logits: Tensor, part: Sequence[Question]) -> list[Tensor]:
        """Of logits that tokens are drawn from, and of raw ones where these differ."""
        raw = logits[upload(np.array([question.row_index for question in part]), logits.device)]
        if not part[0].row.changes_logits:
            return [ask(self._kernels, raw, part)]
        changed = changed_logits(raw, [question.row for question in part], self.counts)
        asked = [ask(self._kernels, changed, part)]
        if any(question.record.num_raw_candidates for question in part):
            asked.append(ask(self._kernels, raw, part))
        return asked


def _questions(rows: Sequence[SamplingRow], vocab_size: int) -> Iterator[Question]:
    """Of rows that need more than their largest logit, and less than all."""
    for index, row in enumerate(rows):
        if row.takes_largest:
            continue
        changes = row.changes_logits
        record = row_record(row.params, changes_logits=changes, vocab_size=vocab_size, largest_shard=vocab_size)
        if not record.is_gathered:
            yield Question(index, row, record)


def _draw(part: _Part, found: Largest, vocab_size: int, outcomes: RowOutcomes, drawn: dict[int, int]) -> None:
    """Tokens of the rows that have not failed, by their index."""
    for place, question in enumerate(part.questions):
        index = question.row_index
        if index in outcomes.failed:
            continue
        try:
            token_id = _token_id(question, part.answers, place, int(found.token_ids[index]), vocab_size)
        except KernelError as error:
            outcomes.fail(index, error)
            continue
        if token_id is None:
            outcomes.whole.append(index)
        else:
            drawn[index] = token_id


def _scored(
    logits: Tensor, rows: Sequence[SamplingRow], drawn: Mapping[int, int], parts: Sequence[_Part]
) -> Iterator[tuple[int, SampledToken]]:
    """Tokens with their log probabilities under raw logits, by index. Those that are not among the most likely ones are
    looked up together, with one more copy."""
    likely = {
        question.row_index: part.raw.likely(place, question.record.num_raw_places)
        for part in parts
        for place, question in enumerate(part.questions)
        if question.record.num_raw_places and question.row_index in drawn
    }
    unlikely: list[tuple[int, int]] = []
    for index, token_id in drawn.items():
        row = rows[index]
        if row.params.logprobs is None:
            yield index, SampledToken(row.seq_id, token_id)
        elif (logprobs := logprobs_among(*likely[index], token_id, row.params.logprobs)) is None:
            unlikely.append((index, token_id))
        else:
            yield index, SampledToken(row.seq_id, token_id, logprobs)
    if not unlikely:
        return
    for (index, token_id), (logit, rank) in zip(unlikely, _look_up(logits, unlikely), strict=True):
        row, among = rows[index], likely[index]
        assert row.params.logprobs is not None, "it was asked for"
        token = TokenLogprob(token_id=token_id, logprob=logit - among[2], rank=rank)
        yield index, SampledToken(row.seq_id, token_id, logprobs_beside(token, *among, row.params.logprobs))


def _look_up(logits: Tensor, tokens: Sequence[tuple[int, int]]) -> list[tuple[float, int]]:
    """Logit and rank of (row index, token id)."""
    row_indices, token_ids = upload(np.array(tokens), logits.device).unbind(1)
    rows = logits[row_indices]
    own = rows.gather(1, token_ids.unsqueeze(1))
    ranks = 1 + (rows > own).sum(1, dtype=torch.int32)
    words = download([own.squeeze(1).view(torch.int32), ranks])
    return list(zip(words[0].view(np.float32).tolist(), words[1].tolist(), strict=True))


def _token_id(question: Question, answers: Answers, place: int, largest_id: int, vocab_size: int) -> int | None:
    """None if what the device said does not tell. largest_id: of the row's raw logits.

    Raises:
        KernelError: what the row changes leaves +inf or no finite logit.
    """
    row, record = question.row, question.record
    if row.changes_logits:
        check_changed_finite(float(answers.logits[place, 0]))
    if row.params.is_greedy:
        return int(answers.token_ids[place, 0]) if row.changes_logits else largest_id
    if record.is_drawn_by_owner:
        low, high = answers.drawn[place].tolist()
        return low if low == high < vocab_size else None
    likely = slice(0, record.num_places)
    total = float(np.exp(np.float64(answers.log_weight_sums[place])))
    totals = [total * (1 + margin) for margin in (-RELATIVE_MARGIN, RELATIVE_MARGIN)]
    token_ids, logits = answers.token_ids[place, likely], answers.logits[place, likely]
    return draw_among(token_ids, logits, totals, vocab_size, row.params, row.uniform)


def _in_parts(questions: Sequence[Question]) -> Iterator[Sequence[Question]]:
    """Those of rows that are changed apart from the others."""
    for are_changed in (False, True):
        kind = [question for question in questions if question.row.changes_logits is are_changed]
        yield from (kind[start : start + _MAX_ROWS] for start in range(0, len(kind), _MAX_ROWS))
