"""Picks the next token of each sequence from its row of logits.

Per row, in this order (transformers' and vLLM's, but for min_p, which vLLM applies before top_k and top_p):
logit_bias, tokens forbidden until min_tokens, penalties, then the largest logit if greedy, else temperature, top_k,
top_p, min_p and a draw. Log probabilities are of the raw logits.

A row's token depends on that row alone, bit for bit: rows are handled one at a time, and the random number of output
position i is a pure function of (seed, i). Rows are read on the host by numpy, whose argmax of a large float32 row is
several times faster than torch's on a CPU. Logits on a GPU come to the host for rows that need more.
"""

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from torch import Tensor

from headrace.config import SamplingParams
from headrace.engine.draw import Row, draw_token
from headrace.engine.logprobs import explain_not_finite, float32_row, token_logprobs
from headrace.engine.penalties import TokenCounts, add_bias_, forbid_, penalize_
from headrace.engine.plan import SampledToken
from headrace.engine.random_stream import uniform_at
from headrace.errors import KernelError, ShapeError


@dataclass(frozen=True, kw_only=True)
class SamplingRow:
    """What the sampler needs of the sequence behind one row of logits.

    prompt_token_ids, output_token_ids: may be live lists; read, never written. Between steps they may only grow.
    seed: names the stream of draws; outputs of one request have different seeds.
    """

    seq_id: int
    params: SamplingParams
    seed: int
    prompt_token_ids: Sequence[int]
    output_token_ids: Sequence[int]
    eos_token_ids: Collection[int] = ()
    _is_plain: bool = field(init=False, repr=False)
    """Greedy, and nothing that changes logits but perhaps min_tokens. Known once, asked at every token."""

    def __post_init__(self) -> None:
        params = self.params
        is_plain = params.is_greedy and params.logprobs is None and not params.logit_bias and not params.has_penalties
        object.__setattr__(self, "_is_plain", is_plain)

    @property
    def must_continue(self) -> bool:
        return len(self.output_token_ids) < self.params.min_tokens

    @property
    def changes_logits(self) -> bool:
        return bool(self.params.logit_bias) or self.params.has_penalties or self.must_continue

    @property
    def takes_largest(self) -> bool:
        """Nothing is needed but the largest raw logit."""
        return self._is_plain and not self.must_continue


class SampleOutcome(NamedTuple):
    """Tokens of the rows that gave one, in row order, and the reason for each row that did not, by seq_id."""

    sampled: tuple[SampledToken, ...]
    failed: Mapping[int, str]


class Sampler:
    """Owns the token counts of sequences with penalties, and nothing a result depends on: they can be counted again.

    Counts are kept for the sequences of the last call only, so a finished or preempted sequence leaves nothing behind.
    """

    def __init__(self) -> None:
        self._counts: dict[int, TokenCounts] = {}

    def sample(self, logits: Tensor, rows: Sequence[SamplingRow]) -> SampleOutcome:
        """One token for each row; a row of NaN, +inf or nothing but -inf fails alone.

        Equal logits: the smallest id is taken when greedy, and is the more likely one to top_k and top_p.

        Shapes:
            logits: [num_rows, vocab_size], any float dtype, any device; computed in float32, never written
        Raises:
            ShapeError: logits and rows do not pair up.
        """
        view = _float32_view(logits)
        if view is None:
            logits = logits.detach()
            _check_dtype(logits)
        _check_shape(tuple(logits.shape) if view is None else view.shape, len(rows))
        largest = _largest(logits) if view is None else _largest_on_host(view)
        self._counts = {row.seq_id: self._counts_of(row) for row in rows if row.params.has_penalties}
        sampled: list[SampledToken] = []
        failed: dict[int, str] = {}
        for index, (row, (token_id, logit)) in enumerate(zip(rows, largest, strict=True)):
            try:
                _check_finite(logit, "")
                if row.takes_largest:
                    sampled.append(SampledToken(seq_id=row.seq_id, token_id=token_id))
                else:
                    host_row = float32_row(logits[index]) if view is None else view[index]
                    sampled.append(self._sample_row(host_row, row))
            except KernelError as error:
                failed[row.seq_id] = f"no token for sequence {row.seq_id}: {error}"
        return SampleOutcome(sampled=tuple(sampled), failed=failed)

    def _sample_row(self, logits: Row, row: SamplingRow) -> SampledToken:
        params = row.params
        allowed = self._changed(logits, row) if row.changes_logits else logits
        if params.is_greedy:
            token_id = int(allowed.argmax())
        else:
            token_id = draw_token(allowed, params, uniform_at(row.seed, len(row.output_token_ids)))
        logprobs = () if params.logprobs is None else token_logprobs(logits, token_id, params.logprobs)
        return SampledToken(seq_id=row.seq_id, token_id=token_id, logprobs=logprobs)

    def _changed(self, logits: Row, row: SamplingRow) -> Row:
        logits = logits.copy()
        if row.params.logit_bias:
            add_bias_(logits, row.params.logit_bias)
        if row.must_continue:
            forbid_(logits, (*row.eos_token_ids, *row.params.stop_token_ids))
        if row.params.has_penalties:
            penalize_(logits, row.params, self._counts[row.seq_id])
        _check_finite(float(logits.max()), " after logit_bias, min_tokens and penalties")
        return logits

    def _counts_of(self, row: SamplingRow) -> TokenCounts:
        counts = self._counts.get(row.seq_id)
        if counts is not None and counts.follows(row.prompt_token_ids, row.output_token_ids):
            return counts
        return TokenCounts(row.prompt_token_ids, row.output_token_ids, row.params.repetition_penalty != 1)


def _float32_view(logits: Tensor) -> npt.NDArray[np.float32] | None:
    """The logits as numpy sees them; None where rows must be fetched or converted, or where autograd tracks them.

    Trying is one call of torch, where asking for device, dtype and gradients first would be four.
    """
    try:
        view = logits.numpy()
    except (TypeError, RuntimeError):
        return None
    return view if view.dtype == np.float32 else None


def _largest(logits: Tensor) -> list[tuple[int, float]]:
    """Each row's largest logit and its first id. NaN counts as largest, so one look finds every unusable row."""
    return _largest_on_host(map(float32_row, logits)) if logits.is_cpu else _largest_on_device(logits)


def _largest_on_host(rows: Iterable[Row]) -> list[tuple[int, float]]:
    return [(i := int(row.argmax()), float(row[i])) for row in rows]


def _largest_on_device(logits: Tensor) -> list[tuple[int, float]]:
    """Two small copies to the host; torch's argmax, too, documents that it gives the first of equals."""
    token_ids = logits.argmax(dim=-1)
    largest = logits.gather(1, token_ids.unsqueeze(1)).squeeze(1)
    return list(zip(token_ids.tolist(), largest.tolist(), strict=True))


def _check_finite(largest: float, when: str) -> None:
    if not math.isfinite(largest):
        raise KernelError(explain_not_finite(largest) + when)


def _check_dtype(logits: Tensor) -> None:
    if not logits.dtype.is_floating_point:
        raise ShapeError(f"logits are {logits.dtype}; want a float dtype")


def _check_shape(shape: tuple[int, ...], num_rows: int) -> None:
    if len(shape) != 2 or shape[0] != num_rows or shape[1] == 0:
        raise ShapeError(f"logits are {shape} for {num_rows} sequences; want [num_rows, vocab_size]")
