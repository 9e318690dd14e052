"""The step that is run again and again: one new token for each of a few sequences."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from headrace.batch import ForwardBatch
from headrace.cache.kv_share import KvShare
from headrace.costs.memory import num_blocks_for
from headrace.engine.logits import Largest, Logits
from headrace.engine.rows import Row
from headrace.kernels import NOT_STORED, Kernels, Recording

MAX_DECODE_STEP_SEQS = 64
"""Beyond so many sequences a step's arithmetic dwarfs what asking for its ops costs."""

_MAX_KEPT_LOGITS_BYTES = 64 * 2**20
"""Logits are the one large output. Recordings of the head make room for each other within so many bytes, since one is
made as quickly as it is run."""


@dataclass(frozen=True, kw_only=True)
class _Layers:
    num_seqs: int
    recording: Recording
    hidden_states: Tensor


@dataclass(frozen=True, kw_only=True)
class _Head:
    recording: Recording
    logits: Logits


class DecodeStep:
    """Runs decode steps on input buffers that stay where they are, so that a step of a size met before can be replayed
    as two calls, for layers and head, instead of being asked for op by op.

    What a step computes does not depend on whether it is replayed.

    share: the cache blocks this rank has, if not all.
    forward: from a batch to hidden states [num_tokens, hidden_size]; head: from those to logits.
    """

    def __init__(
        self,
        kernels: Kernels,
        forward: Callable[[ForwardBatch], Tensor],
        head: Callable[[Tensor], Tensor],
        block_size: int,
        max_model_len: int,
        share: KvShare | None = None,
    ) -> None:
        self._kernels = kernels
        self._forward = forward
        self._head = head
        self._block_size = block_size
        self._share = share
        width = num_blocks_for(max_model_len, block_size)
        self._input_ids = np.zeros(MAX_DECODE_STEP_SEQS, dtype=np.int64)
        self._positions = np.zeros(MAX_DECODE_STEP_SEQS, dtype=np.int64)
        self._slot_mapping = np.zeros(MAX_DECODE_STEP_SEQS, dtype=np.int64)
        self._block_tables = np.full((MAX_DECODE_STEP_SEQS, width), -1, dtype=np.int32)
        # Counts of a table's blocks; those past its end are never read.
        self._owned_blocks = np.zeros((MAX_DECODE_STEP_SEQS, width + 1), dtype=np.int32)
        self._context_lens = np.zeros(MAX_DECODE_STEP_SEQS, dtype=np.int32)
        self._cu_seqlens_q = np.arange(MAX_DECODE_STEP_SEQS + 1, dtype=np.int32)
        self._written_tables: list[NDArray[np.int32] | None] = [None] * MAX_DECODE_STEP_SEQS
        """What the rows of block_tables were copied from: tables grow once in many steps."""
        self._layers: dict[int, _Layers] = {}
        self._heads: dict[int, _Head] = {}
        self._last: _Layers | None = None
        """What this object ran last, if it can be replayed."""

    @property
    def obstacle(self) -> str | None:
        """What keeps steps from being replayed, once one has been tried."""
        tried = [step.recording for step in self._layers.values()]
        tried += [head.recording for head in self._heads.values()]
        return next((recording.obstacle for recording in tried if recording.obstacle), None)

    def forget(self) -> None:
        """Record anew from now on: a recording keeps the implementations that were chosen when it was made."""
        self._layers.clear()
        self._heads.clear()
        self._last = None

    def run(self, rows: Sequence[Row]) -> Tensor:
        """Hidden states [num_seqs, hidden_size], valid until the next run."""
        self._fill(rows)
        num_seqs = len(rows)
        layers = self._layers.get(num_seqs)
        if layers is None:
            layers = self._layers[num_seqs] = self._record_layers(num_seqs)
        elif layers.recording.replay is None:
            return self._forward(self._batch(num_seqs))
        else:
            layers.recording.replay()
        self._last = layers if layers.recording.replay is not None else None
        return layers.hidden_states

    def logits(self, hidden_states: Tensor) -> Logits | None:
        """Logits of what the last run returned, valid until the next one; None of anything that was not replayed."""
        last = self._last
        if last is None or last.hidden_states is not hidden_states:
            return None
        head = self._heads.get(last.num_seqs)
        if head is None:
            head = self._heads[last.num_seqs] = self._record_head(hidden_states)
        elif head.recording.replay is None:
            return None
        else:
            head.recording.replay()
        return head.logits

    def _record_layers(self, num_seqs: int) -> _Layers:
        batch = self._batch(num_seqs)
        hidden_states, recording = self._kernels.record(lambda: self._forward(batch))
        return _Layers(num_seqs=num_seqs, recording=recording, hidden_states=hidden_states)

    def _record_head(self, hidden_states: Tensor) -> _Head:
        def run() -> tuple[Tensor, Tensor, Tensor]:
            logits = self._head(hidden_states)
            # A rank may hold no share of a small vocabulary.
            return logits, *(self._kernels.argmax(logits) if logits.shape[1] else _no_largest(len(logits)))

        (logits, token_ids, largest), recording = self._kernels.record(run)
        self._make_room(logits.nbytes)
        return _Head(recording=recording, logits=Logits(logits, Largest(token_ids.numpy(), largest.numpy())))

    def _make_room(self, num_bytes: int) -> None:
        """Forget the heads recorded first until another one fits."""
        kept = sum(head.logits.logits.nbytes for head in self._heads.values())
        for num_seqs in tuple(self._heads):
            if kept + num_bytes <= _MAX_KEPT_LOGITS_BYTES:
                return
            kept -= self._heads.pop(num_seqs).logits.logits.nbytes

    def _fill(self, rows: Sequence[Row]) -> None:
        size = self._block_size
        for i, (token_ids, position, block_table) in enumerate(rows):
            self._input_ids[i] = token_ids[0]
            self._positions[i] = position
            self._slot_mapping[i] = self._slot(block_table.item(position // size), position % size)
            self._context_lens[i] = position + 1
            if self._written_tables[i] is not block_table:
                self._write_table(i, block_table)
                self._written_tables[i] = block_table

    def _slot(self, block_id: int, offset: int) -> int:
        if self._share is None:
            return block_id * self._block_size + offset
        local_id = self._share.local_block(block_id)
        return NOT_STORED if local_id is None else local_id * self._block_size + offset

    def _write_table(self, i: int, block_table: NDArray[np.int32]) -> None:
        if self._share is not None:
            block_table, counts = self._share.local_table(block_table)
            self._owned_blocks[i, : len(counts)] = counts
        self._block_tables[i, : len(block_table)] = block_table

    def _batch(self, num_seqs: int) -> ForwardBatch:
        return ForwardBatch(
            input_ids=torch.from_numpy(self._input_ids[:num_seqs]),
            positions=torch.from_numpy(self._positions[:num_seqs]),
            slot_mapping=torch.from_numpy(self._slot_mapping[:num_seqs]),
            block_tables=torch.from_numpy(self._block_tables[:num_seqs]),
            context_lens=torch.from_numpy(self._context_lens[:num_seqs]),
            cu_seqlens_q=torch.from_numpy(self._cu_seqlens_q[: num_seqs + 1]),
            owned_blocks=None if self._share is None else torch.from_numpy(self._owned_blocks[:num_seqs]),
        )


def _no_largest(num_rows: int) -> tuple[Tensor, Tensor]:
    return torch.from_numpy(np.zeros(num_rows, np.int64)), torch.from_numpy(np.full(num_rows, -np.inf, np.float32))
