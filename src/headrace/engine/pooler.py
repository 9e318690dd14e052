"""Hidden states of prompts become embeddings, chunk by chunk."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from headrace.config.pooling import Pooling, PoolingParams
from headrace.engine.plan import Embedding, ScheduledChunk

_MAX_ROWS = 64
"""Rows that exist in float64 at once."""


class PoolingRows(NamedTuple):
    """A chunk of a prompt that is pooled, and its hidden states [num_tokens, hidden_size] as the layers leave them."""

    chunk: ScheduledChunk
    params: PoolingParams
    num_prompt_tokens: int
    hidden_states: Tensor

    @property
    def is_last(self) -> bool:
        return self.chunk.start + self.chunk.num_tokens == self.num_prompt_tokens


class Pooled(NamedTuple):
    """What a step's chunks bring.

    failed: why there is no embedding, by sequence id. sums: of prompts that go on, by sequence id.
    """

    embeddings: tuple[Embedding, ...]
    failed: dict[int, str]
    sums: dict[int, tuple[int, Tensor]]


class Pooler:
    """Owns the sums of prompts whose mean is wanted, from their first chunk to their last.

    Sums are made token by token in float64, so that they do not depend on how a prompt was cut. A prompt that starts
    over is summed again, a step that fails before `keep` has changed no sum, and one that is undone after it leaves the
    sum that was there before.

    finish: makes the model's last hidden states of rows as its layers leave them, each row by itself.
    max_undone_steps: of those that were kept, how many may be undone together.
    """

    def __init__(self, finish: Callable[[Tensor], Tensor], max_undone_steps: int = 0) -> None:
        self._finish = finish
        self._num_kept = 1 + max_undone_steps
        self._sums: dict[int, dict[int, Tensor]] = {}
        """By sequence id and number of tokens, those of the most tokens last."""

    def pool(self, rows: Sequence[PoolingRows]) -> Pooled:
        """Take in one step's chunks; the embeddings of those that were the last ones of their prompts."""
        sums: dict[int, tuple[int, Tensor]] = {}
        finished: list[tuple[PoolingRows, Tensor]] = []
        for row in rows:
            if row.params.pooling is Pooling.MEAN:
                total = self._total(row)
                if row.is_last:
                    finished.append((row, total / row.num_prompt_tokens))
                else:
                    sums[row.chunk.seq_id] = row.chunk.start + row.chunk.num_tokens, total
            elif row.is_last:
                finished.append((row, self._finish(row.hidden_states[-1:])[0].double()))
        return _read(finished, sums)

    def keep(self, pooled: Pooled) -> None:
        """The step is done: its sums are what the next chunks are added to."""
        for seq_id, (num_tokens, total) in pooled.sums.items():
            # Those of more tokens were undone.
            before = [kept for kept in self._sums.get(seq_id, {}).items() if kept[0] < num_tokens]
            self._sums[seq_id] = dict([*before, (num_tokens, total)][-self._num_kept :])

    def forget(self, seq_id: int) -> None:
        self._sums.pop(seq_id, None)

    def reset(self) -> None:
        self._sums.clear()

    def _total(self, row: PoolingRows) -> Tensor:
        """The sum of the prompt's first tokens, up to this chunk's last."""
        totals = [self._sums[row.chunk.seq_id][row.chunk.start]] if row.chunk.start else []
        for part in torch.split(row.hidden_states, _MAX_ROWS):
            rows = self._finish(part).double()
            # A plain sum may add in any order.
            totals = [torch.cumsum(torch.vstack([*totals, rows]), dim=0)[-1]]
        return totals[0]


def _read(finished: Sequence[tuple[PoolingRows, Tensor]], sums: dict[int, tuple[int, Tensor]]) -> Pooled:
    """One copy from the device for all."""
    if not finished:
        return Pooled((), {}, sums)
    vectors = torch.stack([vector for _, vector in finished]).cpu().numpy()
    embeddings: list[Embedding] = []
    failed: dict[int, str] = {}
    for (row, _), vector in zip(finished, vectors, strict=True):
        seq_id = row.chunk.seq_id
        values = _normalized(vector) if row.params.normalize else vector.astype(np.float32)
        if np.isfinite(values).all():
            embeddings.append(Embedding(seq_id, values.tobytes()))
        else:
            failed[seq_id] = "the model's hidden states are not finite numbers: no embedding can be made of them"
    return Pooled(tuple(embeddings), failed, sums)


def _normalized(vector: NDArray[np.float64]) -> NDArray[np.float32]:
    """Of length 1; zeros stay zeros."""
    length = np.sqrt(np.square(vector).sum())
    return (vector / length if length > 0 else vector).astype(np.float32)
