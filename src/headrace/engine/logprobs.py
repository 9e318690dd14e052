"""Natural-log probabilities under the raw logits, before bias, penalties and temperature."""

import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from headrace.engine.draw import Ids, Row, largest_tokens
from headrace.engine.plan import TokenLogprob
from headrace.errors import KernelError, ShapeError


def token_logprobs(logits: Row, token_id: int, num_top: int) -> tuple[TokenLogprob, ...]:
    """The given token, then the num_top most likely ones without repeating it, equals by id.

    logprob[t] = logits[t] - lse, lse = max + log(sum(exp(logits - max)))
    rank[t] = 1 + number of tokens with a strictly larger logit
    """
    lse = _lse(logits)
    logit = float(logits[token_id])
    rank = 1 + int(np.count_nonzero(logits > logits[token_id]))
    top_ids = largest_tokens(logits, num_top)
    return (
        TokenLogprob(token_id=token_id, logprob=logit - lse, rank=rank),
        *_others(top_ids, logits[top_ids], token_id, lse),
    )


def logprobs_among(
    token_ids: Ids, logits: Row, lse: float, token_id: int, num_top: int
) -> tuple[TokenLogprob, ...] | None:
    """`token_logprobs` from at least num_top of the most likely tokens, given in that order; None if the token is not
    among them, so that its rank is not known."""
    (places,) = np.nonzero(token_ids == token_id)
    if not len(places):
        return None
    logit = logits[places[0]]
    rank = 1 + int(np.count_nonzero(logits > logit))
    token = TokenLogprob(token_id=token_id, logprob=float(logit) - lse, rank=rank)
    return logprobs_beside(token, token_ids, logits, lse, num_top)


def logprobs_beside(
    token: TokenLogprob, token_ids: Ids, logits: Row, lse: float, num_top: int
) -> tuple[TokenLogprob, ...]:
    """`token_logprobs` of a token whose own is known, from at least num_top of the most likely tokens, in order."""
    return (token, *_others(token_ids[:num_top], logits[:num_top], token.token_id, lse))


def prompt_logprobs(
    logits: Tensor, target_token_ids: Sequence[int], num_top: int
) -> tuple[tuple[TokenLogprob, ...], ...]:
    """`token_logprobs` of each row's target, the prompt token that follows the row's position.

    Shapes:
        logits: [num_tokens, vocab_size], any float dtype; one row per target
    Raises:
        ShapeError: rows and targets do not pair up.
        KernelError: a row holds NaN or +inf, or no finite logit.
    """
    if logits.dim() != 2 or len(logits) != len(target_token_ids):
        raise ShapeError(f"prompt logits are {tuple(logits.shape)} for {len(target_token_ids)} prompt tokens")
    rows = (float32_row(row) for row in logits.detach().cpu())
    return tuple(_checked(i, row, t, num_top) for i, (row, t) in enumerate(zip(rows, target_token_ids, strict=True)))


def float32_row(logits: Tensor) -> Row:
    """One row as a numpy array on the host; shares memory with float32 logits on the CPU, so it is only read."""
    host = logits.cpu()
    if host.dtype is torch.bfloat16:
        # A bfloat16 is the upper half of a float32. In numpy, since torch would wake its threads for every row.
        return (host.view(torch.int16).numpy().astype(np.int32) << 16).view(np.float32)
    row: Row = host.float().numpy()
    return row


def explain_not_finite(largest: float) -> str:
    """Why a row whose largest logit is `largest` gives no token: NaN is the maximum of a row that holds one."""
    if math.isnan(largest):
        return "the logits hold NaN"
    return "the logits hold +inf" if largest > 0 else "every token is forbidden: all logits are -inf"


def _checked(index: int, row: Row, target: int, num_top: int) -> tuple[TokenLogprob, ...]:
    largest = float(row.max())
    if not math.isfinite(largest):
        raise KernelError(f"no log probabilities for row {index} of the prompt's logits: {explain_not_finite(largest)}")
    return token_logprobs(row, target, num_top)


def _others(top_ids: Ids, top: Row, token_id: int, lse: float) -> Iterator[TokenLogprob]:
    """The most likely tokens but for the one given."""
    ranks = 1 + np.searchsorted(-top, -top, side="left")
    most_likely = zip(top_ids.tolist(), top.tolist(), ranks.tolist(), strict=True)
    return (TokenLogprob(token_id=i, logprob=x - lse, rank=r) for i, x, r in most_likely if i != token_id)


def sum_of_exp(logits: Row) -> float:
    """sum(exp(logits - max))"""
    with np.errstate(over="ignore", under="ignore"):
        weights = logits - logits.max()
        np.exp(weights, out=weights)
    return float(weights.sum(dtype=np.float64))


def _lse(logits: Row) -> float:
    return float(logits.max()) + math.log(sum_of_exp(logits))
