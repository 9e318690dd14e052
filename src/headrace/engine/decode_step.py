"""The step that is run again and again: one new token for each of a few sequences."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from headrace.batch import ForwardBatch
from headrace.costs.memory import num_blocks_for
from headrace.kernels import Kernels, Recording

MAX_DECODE_STEP_SEQS = 64
"""Beyond so many sequences a step's arithmetic dwarfs what asking for its ops costs."""

DecodeRow = tuple[int, int, NDArray[np.int32]]
"""A token id, its position, and the blocks of its sequence."""


@dataclass(frozen=True, kw_only=True)
class _Recorded:
    recording: Recording
    hidden_states: Tensor


class DecodeStep:
    """Runs decode steps on input buffers that stay where they are, so that a step of a size met before can be replayed
    as one call instead of being asked for op by op.

    What a step computes does not depend on whether it is replayed.

    forward: from a batch to hidden states [num_tokens, hidden_size].
    """

    def __init__(
        self, kernels: Kernels, forward: Callable[[ForwardBatch], Tensor], block_size: int, max_model_len: int
    ) -> None:
        self._kernels = kernels
        self._forward = forward
        self._block_size = block_size
        width = num_blocks_for(max_model_len, block_size)
        self._input_ids = np.zeros(MAX_DECODE_STEP_SEQS, dtype=np.int64)
        self._positions = np.zeros(MAX_DECODE_STEP_SEQS, dtype=np.int64)
        self._slot_mapping = np.zeros(MAX_DECODE_STEP_SEQS, dtype=np.int64)
        self._block_tables = np.full((MAX_DECODE_STEP_SEQS, width), -1, dtype=np.int32)
        self._context_lens = np.zeros(MAX_DECODE_STEP_SEQS, dtype=np.int32)
        self._cu_seqlens_q = np.arange(MAX_DECODE_STEP_SEQS + 1, dtype=np.int32)
        self._recorded: dict[int, _Recorded] = {}

    @property
    def obstacle(self) -> str | None:
        """What keeps steps from being replayed, once one has been tried."""
        return next((step.recording.obstacle for step in self._recorded.values()), None)

    def run(self, rows: Sequence[DecodeRow]) -> Tensor:
        """Hidden states [num_seqs, hidden_size], valid until the next run of as many rows."""
        self._fill(rows)
        num_seqs = len(rows)
        recorded = self._recorded.get(num_seqs)
        if recorded is None:
            return self._record(num_seqs)
        if recorded.recording.replay is None:
            return self._forward(self._batch(num_seqs))
        recorded.recording.replay()
        return recorded.hidden_states

    def _record(self, num_seqs: int) -> Tensor:
        batch = self._batch(num_seqs)
        hidden_states, recording = self._kernels.record(lambda: self._forward(batch))
        self._recorded[num_seqs] = _Recorded(recording=recording, hidden_states=hidden_states)
        return hidden_states

    def _fill(self, rows: Sequence[DecodeRow]) -> None:
        size = self._block_size
        for i, (token_id, position, block_table) in enumerate(rows):
            self._input_ids[i] = token_id
            self._positions[i] = position
            self._slot_mapping[i] = int(block_table[position // size]) * size + position % size
            self._block_tables[i, : len(block_table)] = block_table
            self._context_lens[i] = position + 1

    def _batch(self, num_seqs: int) -> ForwardBatch:
        return ForwardBatch(
            input_ids=torch.from_numpy(self._input_ids[:num_seqs]),
            positions=torch.from_numpy(self._positions[:num_seqs]),
            slot_mapping=torch.from_numpy(self._slot_mapping[:num_seqs]),
            block_tables=torch.from_numpy(self._block_tables[:num_seqs]),
            context_lens=torch.from_numpy(self._context_lens[:num_seqs]),
            cu_seqlens_q=torch.from_numpy(self._cu_seqlens_q[: num_seqs + 1]),
        )
