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

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from headrace.costs.candidates import RowRecord, row_record
from headrace.engine.device_logits import changed_logits
from headrace.engine.draw import Ids, Row, draw_from_nucleus, draw_from_top_k, exp_weights, inverse_cdf_in_blocks
from headrace.engine.logits import HostLogits, Largest
from headrace.engine.logprobs import logprobs_among, logprobs_beside
from headrace.engine.plan import SampledToken, TokenLogprob
from headrace.engine.random_stream import uniform_at
from headrace.engine.sampler import (
    SampleOutcome,
    Sampler,
    SamplingRow,
    check_changed_finite,
    check_finite,
    explain_failure,
)
from headrace.errors import KernelError
from headrace.kernels import Kernels

RELATIVE_MARGIN = 1e-5
"""Of a sum over the vocabulary. Weights are off by up to 1e-6 of themselves in float32 (|logit - max| / temperature of
20 times 2^-24), their sums by ten roundings of 2^-24."""

_MAX_ROWS = 32
"""Handled at once: sums in float64 take 8 bytes for each logit."""

_LARGEST_FLOAT32 = float(np.finfo(np.float32).max)


class Question(NamedTuple):
    """What is to be asked of one row; row_index: its place among the logits."""

    row_index: int
    row: SamplingRow
    record: RowRecord
    largest_id: int

    @property
    def num_candidates(self) -> int:
        # What is changed may leave nothing that could be drawn, as its largest logit says.
        needs_none = self.record.is_drawn_by_owner and not self.row.changes_logits
        num_places = 0 if needs_none else self.record.num_places
        return max(num_places, self.record.num_raw_places)

    @property
    def uniform(self) -> float:
        return uniform_at(self.row.seed, len(self.row.output_token_ids))


@dataclass(frozen=True, kw_only=True)
class Answers:
    """What the device says of some rows.

    Shapes:
        token_ids, logits: [num_rows, k], the most likely tokens, largest first, equals by id
        log_weight_sums: [num_rows], log(sum(exp((logit - largest) / temperature)))
        log_raw_sums: [num_rows], the same at temperature 1
        drawn: [num_rows, 2], where the cumulative sum first exceeds the draw, less and plus the margin
    """

    token_ids: Ids
    logits: Row
    log_weight_sums: Row
    log_raw_sums: Row
    drawn: Ids

    def likely(self, place: int, num_tokens: int) -> tuple[Ids, Row, float]:
        """A row's most likely tokens, their logits, and the log-sum-exp of all."""
        logits = self.logits[place, :num_tokens]
        return self.token_ids[place, :num_tokens], logits, float(logits[0]) + float(self.log_raw_sums[place])


class DeviceSampler(Sampler):
    """Owns what `Sampler` owns.

    copied_rows: rows brought to the host as a whole so far.
    """

    def __init__(self, kernels: Kernels) -> None:
        super().__init__()
        self._kernels = kernels
        self.copied_rows = 0

    def sample(self, logits: Tensor, rows: Sequence[SamplingRow], largest: Largest | None = None) -> SampleOutcome:
        """See `Sampler.sample`.

        Shapes:
            logits: [num_rows, vocab_size] float32, on the kernels' device
        """
        host = HostLogits(logits)
        if largest is None:
            host.check(len(rows))
            found = host.largest()
        else:
            found = list(zip(largest.token_ids.tolist(), largest.logits.tolist(), strict=True))
        self.follow(rows)
        sampled: dict[int, SampledToken] = {}
        failed: dict[int, str] = {}
        questions: list[Question] = []
        copied: list[int] = []
        for index, (row, (token_id, logit)) in enumerate(zip(rows, found, strict=True)):
            try:
                check_finite(logit)
            except KernelError as error:
                failed[row.seq_id] = explain_failure(row, error)
                continue
            if row.takes_largest:
                sampled[index] = SampledToken(row.seq_id, token_id)
            elif (question := _question(index, row, token_id, logits.shape[1])) is None:
                copied.append(index)
            else:
                questions.append(question)
        for part in _in_parts(questions):
            answers, raw = self._ask(logits, part)
            tokens: list[tuple[int, int]] = []
            for place, question in enumerate(part):
                try:
                    drawn = _token_id(question, answers, place, logits.shape[1])
                except KernelError as error:
                    failed[question.row.seq_id] = explain_failure(question.row, error)
                    continue
                if drawn is None:
                    copied.append(question.row_index)
                else:
                    tokens.append((place, drawn))
            for place, token in _scored(logits, part, tokens, raw):
                sampled[part[place].row_index] = token
        self.copied_rows += len(copied)
        host.fetch(copied)
        for index in copied:
            try:
                sampled[index] = self.sample_row(host.row(index), rows[index])
            except KernelError as error:
                failed[rows[index].seq_id] = explain_failure(rows[index], error)
        return SampleOutcome(tuple(token for _, token in sorted(sampled.items())), failed)

    def _ask(self, logits: Tensor, part: Sequence[Question]) -> tuple[Answers, Answers]:
        """Of logits that tokens are drawn from, and of raw ones: the same where no row of the part is changed."""
        indices = [question.row_index for question in part]
        if not part[0].row.changes_logits:
            answers = ask(self._kernels, logits[torch.tensor(indices, device=logits.device)], part)
            return answers, answers
        rows = changed_logits(logits, indices, [question.row for question in part], self._counts)
        answers = ask(self._kernels, rows, part)
        if not any(question.record.num_raw_candidates for question in part):
            return answers, answers
        return answers, ask(self._kernels, logits[torch.tensor(indices, device=logits.device)], part)


def _question(index: int, row: SamplingRow, largest_id: int, vocab_size: int) -> Question | None:
    """None if only the whole row would do."""
    record = row_record(row.params, changes_logits=row.changes_logits, vocab_size=vocab_size, largest_shard=vocab_size)
    return None if record.is_gathered else Question(index, row, record, largest_id)


def ask(kernels: Kernels, rows: Tensor, questions: Sequence[Question]) -> Answers:
    """All that any of the questions needs, of all of them; one copy from the device.

    Shapes: rows [num_questions, vocab_size] float32
    """
    device, num_rows = rows.device, len(questions)
    temperatures = [min(question.row.params.temperature, _LARGEST_FLOAT32) for question in questions]
    # Greedy rows have a temperature of 0, and only raw logits are asked for.
    divisors = torch.tensor([temperature or 1.0 for temperature in temperatures], dtype=torch.float32, device=device)
    gaps = rows - rows.amax(dim=1, keepdim=True)
    scaled = gaps / divisors.unsqueeze(1)
    nothing = torch.zeros(num_rows, dtype=torch.float32, device=device)
    k = min(max(question.num_candidates for question in questions), rows.shape[1])
    token_ids = kernels.top_k(rows, k)
    has_weight_sum = any(question.record.has_weight_sum for question in questions)
    has_raw_sum = any(question.record.num_raw_candidates for question in questions)
    is_drawn = any(question.record.is_drawn_by_owner for question in questions)
    uniforms = torch.tensor([question.uniform for question in questions], dtype=torch.float64, device=device)
    words = torch.cat(
        [
            token_ids.to(torch.int32),
            rows.gather(1, token_ids).view(torch.int32),
            (kernels.log_sum_exp(scaled) if has_weight_sum else nothing).view(torch.int32).unsqueeze(1),
            (kernels.log_sum_exp(gaps) if has_raw_sum else nothing).view(torch.int32).unsqueeze(1),
            _draw(scaled, uniforms) if is_drawn else nothing.to(torch.int32).unsqueeze(1).expand(-1, 2),
        ],
        dim=1,
    )
    return _read(words.cpu().numpy(), k)


def _read(words: NDArray[np.int32], k: int) -> Answers:
    """From one row of words for each row of logits."""
    floats = np.ascontiguousarray(words[:, k : 2 * k + 2]).view(np.float32)
    return Answers(
        token_ids=words[:, :k].astype(np.int64),
        logits=floats[:, :k],
        log_weight_sums=floats[:, k],
        log_raw_sums=floats[:, k + 1],
        drawn=words[:, 2 * k + 2 :].astype(np.int64),
    )


def _draw(scaled: Tensor, uniforms: Tensor) -> Tensor:
    """`Answers.drawn`, int32, of weights exp(scaled)."""
    sums = scaled.double().exp_().cumsum(dim=1)
    totals = sums[:, -1:]
    margins = totals * torch.tensor([[-RELATIVE_MARGIN, RELATIVE_MARGIN]], dtype=torch.float64, device=sums.device)
    return torch.searchsorted(sums, uniforms.unsqueeze(1) * totals + margins, right=True).to(torch.int32)


def _scored(
    logits: Tensor, part: Sequence[Question], tokens: Sequence[tuple[int, int]], raw: Answers
) -> Iterator[tuple[int, SampledToken]]:
    """Tokens, by place in the part, with their log probabilities under raw logits. Those that are not among the most
    likely ones are looked up together, with one more copy."""
    unlikely: list[tuple[int, int]] = []
    for place, token_id in tokens:
        row = part[place].row
        if row.params.logprobs is None:
            yield place, SampledToken(row.seq_id, token_id)
            continue
        likely = raw.likely(place, part[place].record.num_raw_places)
        logprobs = logprobs_among(*likely, token_id, row.params.logprobs)
        if logprobs is None:
            unlikely.append((place, token_id))
        else:
            yield place, SampledToken(row.seq_id, token_id, logprobs)
    if not unlikely:
        return
    found = _look_up(logits, [(part[place].row_index, token_id) for place, token_id in unlikely])
    for (place, token_id), (logit, rank) in zip(unlikely, found, strict=True):
        row, likely = part[place].row, raw.likely(place, part[place].record.num_raw_places)
        assert row.params.logprobs is not None, "it was asked for"
        token = TokenLogprob(token_id=token_id, logprob=logit - likely[2], rank=rank)
        yield place, SampledToken(row.seq_id, token_id, logprobs_beside(token, *likely, row.params.logprobs))


def _look_up(logits: Tensor, tokens: Sequence[tuple[int, int]]) -> list[tuple[float, int]]:
    """Logit and rank of (row index, token id)."""
    row_indices, token_ids = torch.tensor(tokens, device=logits.device).unbind(1)
    rows = logits[row_indices]
    own = rows.gather(1, token_ids.unsqueeze(1))
    ranks = 1 + (rows > own).sum(1, dtype=torch.int32)
    words = torch.stack([own.squeeze(1).view(torch.int32), ranks]).cpu().numpy()
    return list(zip(words[0].view(np.float32).tolist(), words[1].tolist(), strict=True))


def _token_id(question: Question, answers: Answers, place: int, vocab_size: int) -> int | None:
    """None if what the device said does not tell.

    Raises:
        KernelError: what the row changes leaves +inf or no finite logit.
    """
    params, record = question.row.params, question.record
    if question.row.changes_logits:
        check_changed_finite(float(answers.logits[place, 0]))
    if params.is_greedy:
        return int(answers.token_ids[place, 0]) if question.row.changes_logits else question.largest_id
    if record.is_drawn_by_owner:
        low, high = answers.drawn[place].tolist()
        return low if low == high < vocab_size else None
    token_ids = answers.token_ids[place, : record.num_places]
    logits = answers.logits[place, : record.num_places]
    if 0 < params.top_k < vocab_size:
        return draw_from_top_k(token_ids, logits, params, question.uniform)
    weights = exp_weights(logits, params.temperature)
    if params.top_p < 1:
        total = float(np.exp(np.float64(answers.log_weight_sums[place])))
        low, high = (
            draw_from_nucleus(token_ids, weights, total * (1 + margin), params, question.uniform)
            for margin in (-RELATIVE_MARGIN, RELATIVE_MARGIN)
        )
        return low if low == high else None
    if len(token_ids) < vocab_size and not weights[-1] < params.min_p:
        return None
    # All others have a weight of 0, so that the sums are the same, bit for bit, as with a whole row.
    all_weights = np.zeros(vocab_size, np.float32)
    all_weights[token_ids] = np.where(weights < params.min_p, 0, weights)
    return inverse_cdf_in_blocks(all_weights, question.uniform)


def _in_parts(questions: Sequence[Question]) -> Iterator[Sequence[Question]]:
    """Those of rows that are changed apart from the others."""
    for are_changed in (False, True):
        kind = [question for question in questions if question.row.changes_logits is are_changed]
        yield from (kind[start : start + _MAX_ROWS] for start in range(0, len(kind), _MAX_ROWS))
