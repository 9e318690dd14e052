"""From one row of logits to one token: temperature, truncation, and the inverse of the cumulative distribution.

Rows are float32 numpy arrays of length vocab_size and are handled one at a time, so that the token of a row is, bit for
bit, the same alone and in any batch. The largest logit must be finite, which excludes NaN and +inf anywhere in the row.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from headrace.config import SamplingParams
from headrace.costs.candidates import NUCLEUS_CANDIDATES

Row = npt.NDArray[np.float32]
Ids = npt.NDArray[np.int64]
Weights = npt.NDArray[np.floating[Any]]

_MAX_GROUP_SIZE = 64  # tokens per group when bounding the k-th largest logit
_CDF_BLOCK = 256  # tokens per block of the two-level cumulative sum
_LARGEST_FLOAT32 = float(np.finfo(np.float32).max)


def draw_token(logits: Row, params: SamplingParams, uniform: float) -> int:
    """The token at `uniform` of the cumulative distribution that temperature, top_k, top_p and min_p leave.

    With weights w[t] = exp((logits[t] - max) / temperature) of the tokens kept, and 0 of the others, the token is the
    smallest id t with w[0] + ... + w[t] > uniform * sum(w). The steps apply in the order of their names above, each on
    the tokens that the one before left, as in transformers (vLLM applies min_p before top_k and top_p).

    Units: uniform in [0, 1). Weights are float32 over a whole vocabulary (relative error of a probability about 1e-6),
    float64 among candidates; sums across blocks are float64.
    """
    if 0 < params.top_k < len(logits):
        token_ids = largest_tokens(logits, params.top_k)
        return draw_from_top_k(token_ids, logits[token_ids], params, uniform)
    weights = exp_weights(logits, params.temperature)
    if params.top_p < 1:
        token_ids = largest_tokens(logits, NUCLEUS_CANDIDATES)
        total = float(weights.sum(dtype=np.float64))
        drawn = draw_from_nucleus(token_ids, weights[token_ids], total, params, uniform)
        if drawn is not None:
            return drawn
        _keep_nucleus_(logits, weights, params.top_p)
    if params.min_p > 0:
        weights[weights < params.min_p] = 0
    return inverse_cdf_in_blocks(weights, uniform)


def largest_tokens(logits: Row, k: int) -> Ids:
    """Ids of the k largest logits, largest first, equals by id.

    The vocabulary is dealt into groups; the maxima of any k groups are k tokens, so the k-th largest maximum bounds the
    k-th largest logit from below, and few tokens reach that bound. Reads the row twice and sorts only those few.
    """
    k = min(k, len(logits))
    if k == 0:
        return np.empty(0, np.int64)
    group_size = min(_MAX_GROUP_SIZE, len(logits) // (4 * k))  # 4 groups to a token sought: few share one
    maxima = logits
    if group_size > 1:
        num_groups = len(logits) // group_size
        maxima = logits[: num_groups * group_size].reshape(group_size, num_groups).max(axis=0)
    bound = np.partition(maxima, len(maxima) - k)[len(maxima) - k]
    if bound == -np.inf:
        return _few_largest_tokens(logits, k)
    candidates = np.flatnonzero(logits >= bound)
    order = np.argsort(-logits[candidates], kind="stable")
    return candidates[order[:k]]


def _few_largest_tokens(logits: Row, k: int) -> Ids:
    """`largest_tokens` where fewer than k are allowed: sorts those, and not all that are not."""
    is_allowed = logits > -np.inf
    allowed = np.flatnonzero(is_allowed)
    allowed = allowed[np.argsort(-logits[allowed], kind="stable")]
    others = np.flatnonzero(~is_allowed)
    return np.concatenate([allowed, others])[:k]


def draw_among(
    token_ids: Ids, logits: Row, totals: Sequence[float], vocab_size: int, params: SamplingParams, uniform: float
) -> int | None:
    """`draw_token` from the most likely tokens alone, given with their ids, largest first; None if they do not tell.

    totals: what the sum of `exp_weights` over the whole vocabulary may be, for top_p. All must give the same token.
    """
    if 0 < params.top_k < vocab_size:
        return draw_from_top_k(token_ids, logits, params, uniform)
    weights = exp_weights(logits, params.temperature)
    if params.top_p < 1:
        first, *others = [draw_from_nucleus(token_ids, weights, total, params, uniform) for total in totals]
        return first if all(other == first for other in others) else None
    if len(token_ids) < vocab_size and not weights[-1] < params.min_p:
        return None
    # All others have a weight of 0, so that the sums are the same, bit for bit, as with a whole row.
    all_weights = np.zeros(vocab_size, np.float32)
    all_weights[token_ids] = np.where(weights < params.min_p, 0, weights)
    return inverse_cdf_in_blocks(all_weights, uniform)


def draw_from_top_k(token_ids: Ids, logits: Row, params: SamplingParams, uniform: float) -> int:
    """Draw among the top_k largest logits, given with their ids, largest first."""
    weights = np.exp((logits.astype(np.float64) - float(logits[0])) / params.temperature)
    num_kept = _nucleus_size(weights, params.top_p * float(weights.sum())) if params.top_p < 1 else len(weights)
    return _draw_among(token_ids[:num_kept], weights[:num_kept], params, uniform)


def draw_from_nucleus(token_ids: Ids, weights: Row, total: float, params: SamplingParams, uniform: float) -> int | None:
    """Draw among the nucleus of top_p, if the most likely tokens hold it; None if it is larger.

    token_ids, weights: the most likely tokens, in that order, and their `exp_weights`; total: sum over all tokens.
    """
    num_kept = _nucleus_size(weights, params.top_p * total)
    if num_kept > len(token_ids):
        return None
    return _draw_among(token_ids[:num_kept], weights[:num_kept].astype(np.float64), params, uniform)


def exp_weights(logits: Row, temperature: float) -> Row:
    """exp((logits - max) / temperature), at most 1: subtracting first, nothing overflows but towards a weight of 0."""
    divisor = np.float32(min(temperature, _LARGEST_FLOAT32))  # -inf / inf would be NaN
    with np.errstate(over="ignore", under="ignore"):
        weights: Row = logits - logits.max()
        weights /= divisor
        np.exp(weights, out=weights)
    return weights


def _nucleus_size(weights: Weights, target: float) -> int:
    """How many leading weights make a sum of at least `target`: the one that crosses it is counted."""
    return int(np.searchsorted(np.cumsum(weights, dtype=np.float64), target, side="left")) + 1


def _keep_nucleus_(logits: Row, weights: Row, top_p: float) -> None:
    """Set the weights outside the nucleus to 0, without sorting the vocabulary.

    The bits of floats that are not negative order as integers: the upper 16 of max - logit are 32640 buckets from the
    most likely token down. The bucket where the sum crosses top_p is the only one whose tokens are sorted.
    """
    with np.errstate(over="ignore"):
        gaps = np.abs(logits - logits.max())  # abs: a zero less a zero may be -0.0, whose sign bit sorts it last
    buckets = (gaps.view(np.uint32) >> 16).astype(np.int64)
    sums = np.cumsum(np.bincount(buckets, weights=weights))
    target = top_p * float(sums[-1])
    crossing = int(np.searchsorted(sums, target, side="left"))
    inside = np.flatnonzero(buckets == crossing)
    inside = inside[np.argsort(gaps[inside], kind="stable")]
    before = float(sums[crossing - 1]) if crossing else 0.0
    dropped = inside[_nucleus_size(weights[inside], target - before) :]
    weights[buckets > crossing] = 0
    weights[dropped] = 0


def _draw_among(token_ids: Ids, weights: Weights, params: SamplingParams, uniform: float) -> int:
    """Draw among candidates given most likely first, after min_p, in the order of their ids."""
    kept = np.flatnonzero(weights >= params.min_p * weights[0])
    kept = kept[np.argsort(token_ids[kept])]
    return int(token_ids[kept[_inverse_cdf(weights[kept], uniform)]])


def _inverse_cdf(weights: Weights, uniform: float) -> int:
    """The first index where the running sum exceeds uniform * total: never one of weight 0."""
    sums = np.cumsum(weights, dtype=np.float64)
    return first_above(sums, uniform * float(sums[-1]))


def first_above(sums: npt.NDArray[np.float64], target: float) -> int:
    """The first index with sums > target or, where rounding puts the target at the end, the last that adds to it."""
    index = np.searchsorted(sums, target, side="right")
    last = np.searchsorted(sums, sums[-1], side="left")
    return int(min(index, last))


def inverse_cdf_in_blocks(weights: Row, uniform: float) -> int:
    """`_inverse_cdf` of a whole vocabulary: find the block by block sums, then the token inside it."""
    sums = cumulative_block_sums(weights)
    return index_in_blocks(weights, sums, uniform * float(sums[-1]))


def cumulative_block_sums(weights: Row) -> npt.NDArray[np.float64]:
    return np.cumsum(np.add.reduceat(weights, np.arange(0, len(weights), _CDF_BLOCK)), dtype=np.float64)


def index_in_blocks(weights: Row, sums: npt.NDArray[np.float64], target: float) -> int:
    """The first index where the running sum of weights exceeds the target; sums: `cumulative_block_sums` of them."""
    block = first_above(sums, target)
    before = float(sums[block - 1]) if block else 0.0
    start = block * _CDF_BLOCK
    inside = np.cumsum(weights[start : start + _CDF_BLOCK], dtype=np.float64)
    return start + first_above(inside, target - before)
