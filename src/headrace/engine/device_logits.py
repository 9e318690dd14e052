"""What requests change in their logits, changed where the logits lie: `Sampler.changed`, of many rows on a device."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from headrace.engine.penalties import TokenCounts
from headrace.engine.sampler import SamplingRow

_WORD_BITS = 32


def changed_logits(
    logits: Tensor, row_indices: Sequence[int], rows: Sequence[SamplingRow], counts: Mapping[int, TokenCounts]
) -> Tensor:
    """A copy of some rows with mask, bias, forbidden tokens and penalties, the same bits as on the host.

    counts: by sequence id, of rows with penalties.

    Shapes:
        logits:  [num_logits, vocab_size] float32; rows[i] is that of logits[row_indices[i]]
        returns: [num_rows, vocab_size] float32
    """
    out = logits[torch.tensor(row_indices, device=logits.device)]
    _allow_only_(out, rows)
    _add_bias_(out, rows)
    _forbid_(out, rows)
    _penalize_(out, rows, counts)
    return out


def _allow_only_(out: Tensor, rows: Sequence[SamplingRow]) -> None:
    """Masks travel as they are, a bit for each token."""
    masks = {place: np.frombuffer(row.mask, np.int32) for place, row in enumerate(rows) if row.mask is not None}
    if not masks:
        return
    places = torch.tensor(list(masks), device=out.device)
    words = torch.from_numpy(np.stack(list(masks.values()))).to(out.device)
    bits = torch.arange(_WORD_BITS, dtype=torch.int32, device=out.device)
    is_allowed = (words.unsqueeze(2) >> bits & 1).flatten(1)[:, : out.shape[1]]
    out[places] = out[places].masked_fill_(is_allowed == 0, -torch.inf)


def _add_bias_(out: Tensor, rows: Sequence[SamplingRow]) -> None:
    tokens: dict[int, list[int]] = {}
    values: list[float] = []
    for place, row in enumerate(rows):
        if row.params.logit_bias:
            bias = {token_id: value for token_id, value in row.params.logit_bias.items() if token_id < out.shape[1]}
            tokens[place] = list(bias)
            values += bias.values()
    if tokens:
        out[_where(tokens, out)] += torch.from_numpy(np.array(values, np.float32)).to(out.device)


def _forbid_(out: Tensor, rows: Sequence[SamplingRow]) -> None:
    """A model's end-of-sequence id may lie beyond the logits; it cannot be drawn in any case."""
    vocab_size = out.shape[1]
    tokens = {
        place: [i for i in (*row.eos_token_ids, *row.params.stop_token_ids) if i < vocab_size]
        for place, row in enumerate(rows)
        if row.must_continue
    }
    if tokens:
        out[_where(tokens, out)] = -torch.inf


def _penalize_(out: Tensor, rows: Sequence[SamplingRow], counts: Mapping[int, TokenCounts]) -> None:
    """See `penalties.penalize_`: in float64, rounded once."""
    tokens: dict[int, NDArray[np.int64]] = {}
    factors, summands = [], []
    for place, row in enumerate(rows):
        if row.has_penalties:
            token_ids, occurrences = counts[row.seq_id].read()
            is_inside = token_ids < out.shape[1]
            tokens[place], occurrences = token_ids[is_inside], occurrences[is_inside]
            params = row.params
            factors.append(np.full(len(occurrences), params.repetition_penalty))
            summands.append(params.frequency_penalty * occurrences + params.presence_penalty * (occurrences > 0))
    if not tokens:
        return
    where = _where(tokens, out)
    factor, summand = torch.from_numpy(np.stack([np.concatenate(factors), np.concatenate(summands)])).to(out.device)
    seen = out[where].double()
    out[where] = (torch.where(seen > 0, seen / factor, seen * factor) - summand).float()


def _where(tokens: Mapping[int, Sequence[int] | NDArray[np.int64]], out: Tensor) -> tuple[Tensor, Tensor]:
    """Indices of tokens by place; of each row none twice."""
    places = np.repeat(np.array(list(tokens)), [len(ids) for ids in tokens.values()])
    ids = np.concatenate([np.asarray(ids, np.int64) for ids in tokens.values()])
    place, token_id = torch.from_numpy(np.stack([places, ids])).to(out.device)
    return place, token_id
