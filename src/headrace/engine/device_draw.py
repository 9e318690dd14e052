"""Draws from the whole vocabulary, of which each rank has a shard on its device."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from headrace.engine.candidates import NO_TOKEN

_BLOCK = 256
"""Tokens of which one sum is kept, until it is known where the draw falls."""

_LARGEST_FLOAT32 = float(np.finfo(np.float32).max)


@dataclass(frozen=True, kw_only=True)
class WeightSums:
    """Of rows whose tokens may all be drawn, over a shard.

    uniforms: where in [0, 1) of the cumulative sum the token lies.

    Shapes:
        logits:       [num_rows, vocab_size] float32, kept to find the token within its block
        by_block:     [num_rows, ceil(vocab_size / 256)] float64, cumulative
        temperatures, uniforms: [num_rows] float64
    """

    logits: Tensor
    by_block: Tensor
    temperatures: Tensor
    uniforms: Tensor

    @classmethod
    def of(cls, logits: Tensor, weights: Tensor, temperatures: Tensor, uniforms: Tensor) -> "WeightSums":
        """weights: `shard_weights` of the logits."""
        num_rows, vocab_size = weights.shape
        whole = torch.nn.functional.pad(weights, (0, -vocab_size % _BLOCK))
        by_block = whole.view(num_rows, -1, _BLOCK).sum(2).cumsum(1)
        return cls(logits=logits, by_block=by_block, temperatures=temperatures, uniforms=uniforms)


def shard_weights(logits: Tensor, temperatures: Tensor | None) -> Tensor:
    """exp((logit - largest) / temperature) in float64; 0 where all are -inf. temperatures: None for 1.

    Shapes: logits [num_rows, vocab_size] float32, temperatures [num_rows] float64
    """
    largest = _finite_or_zero(logits.amax(1, keepdim=True))
    gaps = logits.double() - largest
    return (gaps if temperatures is None else gaps / _divisors(temperatures)).exp_()


def draw_by_owner(everyones: Tensor, starts: Tensor, sums: WeightSums, rank: int, first_id: int) -> Tensor:
    """The tokens that this rank has, NO_TOKEN for those of others; cumulative sums run through shards in rank order.

    first_id: of this rank's shard. starts: where the rows' records begin.

    Shapes:
        everyones: [world_size, num_words] int32
        starts:    [num_rows] int64
        returns:   [num_rows] int32
    """
    largest = everyones[:, starts + 1].view(torch.float32).double()
    sum_words = everyones[:, torch.stack([starts + 2, starts + 3], dim=1)]
    weight_sums = sum_words.contiguous().view(torch.float64).squeeze(2)
    scaled = weight_sums * ((largest - largest.amax(0)) / sums.temperatures).exp()
    cumulative = scaled.cumsum(0)
    targets = sums.uniforms * cumulative[-1]
    is_own = _first_above(cumulative.T, targets) == rank
    before = cumulative[rank - 1] if rank else torch.zeros_like(targets)
    indices = _index_in_blocks(sums, (targets - before) * (weight_sums[rank] / scaled[rank]))
    return torch.where(is_own, first_id + indices, NO_TOKEN).to(torch.int32)


def _index_in_blocks(sums: WeightSums, targets: Tensor) -> Tensor:
    """The first index where the running sum of a row's weights exceeds its target."""
    block = _first_above(sums.by_block, targets).unsqueeze(1)
    before = torch.where(block > 0, sums.by_block.gather(1, (block - 1).clamp(min=0)), 0.0)
    indices = block * _BLOCK + torch.arange(_BLOCK, device=block.device)
    last = sums.logits.shape[1] - 1
    gaps = sums.logits.gather(1, indices.clamp(max=last)).double() - _finite_or_zero(sums.logits.amax(1, keepdim=True))
    weights = torch.where(indices <= last, (gaps / _divisors(sums.temperatures)).exp_(), 0.0)
    inside = _first_above(weights.cumsum(1), targets - before.squeeze(1))
    return (block.squeeze(1) * _BLOCK + inside).clamp(max=last)


def _first_above(sums: Tensor, targets: Tensor) -> Tensor:
    """`draw.first_above` of each row; of NaN an index all the same.

    Shapes: sums [num_rows, n], targets [num_rows]; returns [num_rows] int64
    """
    adds = torch.nn.functional.pad(sums, (1, 0)).diff(dim=1) > 0
    last = sums.shape[1] - 1 - adds.flip(1).to(torch.int8).argmax(1)
    is_above = sums > targets.unsqueeze(1)
    return torch.where(is_above.any(1), is_above.to(torch.int8).argmax(1), last)


def _divisors(temperatures: Tensor) -> Tensor:
    return temperatures.clamp(max=_LARGEST_FLOAT32).unsqueeze(1)


def _finite_or_zero(x: Tensor) -> Tensor:
    return torch.where(x.isfinite(), x, 0.0)
