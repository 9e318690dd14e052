"""What is asked of rows of logits on a GPU, and what it says of them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from headrace.costs.candidates import RowRecord
from headrace.engine.draw import Ids, Row
from headrace.engine.sampler import SamplingRow
from headrace.engine.transfers import upload
from headrace.kernels import Kernels

RELATIVE_MARGIN = 1e-5
"""Of a sum over the vocabulary. Weights are off by up to 1e-6 of themselves in float32 (|logit - max| / temperature of
20 times 2^-24), their sums by ten roundings of 2^-24."""

_LARGEST_FLOAT32 = float(np.finfo(np.float32).max)


class Question(NamedTuple):
    """What is to be asked of one row; row_index: its place among the logits."""

    row_index: int
    row: SamplingRow
    record: RowRecord

    @property
    def num_candidates(self) -> int:
        # What is changed may leave nothing that could be drawn, as its largest logit says.
        needs_none = self.record.is_drawn_by_owner and not self.row.changes_logits
        num_places = 0 if needs_none else self.record.num_places
        return max(num_places, self.record.num_raw_places)


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


def ask(kernels: Kernels, rows: Tensor, questions: Sequence[Question]) -> Tensor:
    """All that any of the questions needs, of all of them, as words that `read_answers` reads. Waits for nothing.

    Shapes: rows [num_questions, vocab_size] float32; returns [num_questions, num_words] int32
    """
    device, num_rows = rows.device, len(questions)
    temperatures = [min(question.row.params.temperature, _LARGEST_FLOAT32) for question in questions]
    # Greedy rows have a temperature of 0, and only raw logits are asked for.
    divisors = upload(np.array([temperature or 1.0 for temperature in temperatures], np.float32), device)
    gaps = rows - rows.amax(dim=1, keepdim=True)
    scaled = gaps / divisors.unsqueeze(1)
    nothing = torch.zeros(num_rows, dtype=torch.float32, device=device)
    token_ids = kernels.top_k(rows, max(question.num_candidates for question in questions))
    has_weight_sum = any(question.record.has_weight_sum for question in questions)
    has_raw_sum = any(question.record.num_raw_candidates for question in questions)
    is_drawn = any(question.record.is_drawn_by_owner for question in questions)
    uniforms = upload(np.array([question.row.uniform for question in questions]), device)
    return torch.cat(
        [
            token_ids.to(torch.int32),
            rows.gather(1, token_ids).view(torch.int32),
            (kernels.log_sum_exp(scaled) if has_weight_sum else nothing).view(torch.int32).unsqueeze(1),
            (kernels.log_sum_exp(gaps) if has_raw_sum else nothing).view(torch.int32).unsqueeze(1),
            _draw(scaled, uniforms) if is_drawn else nothing.to(torch.int32).unsqueeze(1).expand(-1, 2),
        ],
        dim=1,
    )


def read_answers(words: NDArray[np.int32]) -> Answers:
    """From one row of words for each row of logits: ids and logits of k tokens, two sums, two draws."""
    k = (words.shape[1] - 4) // 2
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
    targets, margins = uniforms.unsqueeze(1) * totals, RELATIVE_MARGIN * totals
    both = torch.cat([targets - margins, targets + margins], dim=1)
    return torch.searchsorted(sums, both, right=True).to(torch.int32)
