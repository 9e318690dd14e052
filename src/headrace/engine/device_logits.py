"""What requests change in their logits, changed where the logits lie: `Sampler.changed`, of many rows on a device."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from headrace.engine.penalties import TokenCounts
from headrace.engine.sampler import SamplingRow
from headrace.engine.transfers import upload

_WORD_BITS = 32


def changed_logits(
    logits: Tensor, rows: Sequence[SamplingRow], counts: Mapping[int, TokenCounts], first_id: int = 0
) -> Tensor:
    """A copy with mask, bias, forbidden tokens and penalties, the same bits as on the host. Waits for nothing.

    counts: by sequence id, of rows with penalties. first_id: of the vocabulary, the token that logits begin with.

    Shapes: logits and what is returned [num_rows, vocab_size] float32
    """
    out = logits.clone()
    _allow_only_(out, rows, first_id)
    _add_bias_(out, rows, first_id)
    _forbid_(out, rows, first_id)
    _penalize_(out, rows, counts, first_id)
    return out


def _allow_only_(out: Tensor, rows: Sequence[SamplingRow], first_id: int) -> None:
    """Masks travel as they are, a bit for each token."""
    first, end = first_id // _WORD_BITS, -(-(first_id + out.shape[1]) // _WORD_BITS)
    masks = {
        place: np.frombuffer(row.mask, np.int32)[first:end] for place, row in enumerate(rows) if row.mask is not None
    }
    if not masks:
        return
    places = upload(np.array(list(masks)), out.device)
    words = upload(np.stack(list(masks.values())), out.device)
    bits = torch.arange(_WORD_BITS, dtype=torch.int32, device=out.device)
    start = first_id % _WORD_BITS
    is_allowed = (words.unsqueeze(2) >> bits & 1).flatten(1)[:, start : start + out.shape[1]]
    out[places] = out[places].masked_fill_(is_allowed == 0, -torch.inf)


def _add_bias_(out: Tensor, rows: Sequence[SamplingRow], first_id: int) -> None:
    tokens: dict[int, list[int]] = {}
    values: list[float] = []
    for place, row in enumerate(rows):
        bias = {i: value for i, value in row.params.logit_bias.items() if 0 <= i - first_id < out.shape[1]}
        if bias:
            tokens[place] = [token_id - first_id for token_id in bias]
            values += bias.values()
    if tokens:
        out[_where(tokens, out)] += upload(np.array(values, np.float32), out.device)


def _forbid_(out: Tensor, rows: Sequence[SamplingRow], first_id: int) -> None:
    """A model's end-of-sequence id may lie beyond the logits; it cannot be drawn in any case."""
    tokens = {
        place: [i - first_id for i in forbidden if 0 <= i - first_id < out.shape[1]]
        for place, row in enumerate(rows)
        if row.must_continue and (forbidden := (*row.eos_token_ids, *row.params.stop_token_ids))
    }
    if any(tokens.values()):
        out[_where(tokens, out)] = -torch.inf


def _penalize_(out: Tensor, rows: Sequence[SamplingRow], counts: Mapping[int, TokenCounts], first_id: int) -> None:
    """See `penalties.penalize_`: in float64, rounded once."""
    tokens: dict[int, NDArray[np.int64]] = {}
    factors, summands = [], []
    for place, row in enumerate(rows):
        if row.has_penalties:
            token_ids, occurrences = counts[row.seq_id].read()
            token_ids -= first_id
            is_inside = (token_ids >= 0) & (token_ids < out.shape[1])
            tokens[place], occurrences = token_ids[is_inside], occurrences[is_inside]
            params = row.params
            factors.append(np.full(len(occurrences), params.repetition_penalty))
            summands.append(params.frequency_penalty * occurrences + params.presence_penalty * (occurrences > 0))
    if not tokens:
        return
    where = _where(tokens, out)
    factor, summand = upload(np.stack([np.concatenate(factors), np.concatenate(summands)]), out.device)
    seen = out[where].double()
    out[where] = (torch.where(seen > 0, seen / factor, seen * factor) - summand).float()


def _where(tokens: Mapping[int, Sequence[int] | NDArray[np.int64]], out: Tensor) -> tuple[Tensor, Tensor]:
    """Indices of tokens by place; of each row none twice."""
    places = np.repeat(np.array(list(tokens)), [len(ids) for ids in tokens.values()])
    ids = np.concatenate([np.asarray(ids, np.int64) for ids in tokens.values()])
    place, token_id = upload(np.stack([places, ids]), out.device)
    return place, token_id
