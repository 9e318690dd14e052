"""Turns rows of token ids and block tables into one forward pass."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from headrace.batch import ForwardBatch
from headrace.cache.kv_pool import KvPool
from headrace.engine.decode_step import MAX_DECODE_STEP_SEQS, DecodeStep
from headrace.models.decoder import Decoder


class Row(NamedTuple):
    """New tokens of one sequence: positions start, start + 1, ...; block_table covers them and all before.

    Shapes: block_table [num_blocks] int32
    """

    token_ids: Sequence[int]
    start: int
    block_table: NDArray[np.int32]

    @property
    def stop(self) -> int:
        return self.start + len(self.token_ids)


class ModelRunner:
    """One stage's decoder and the cache it writes to.

    max_model_len: the longest sequence that will come.
    """

    def __init__(self, decoder: Decoder, kv_pool: KvPool, max_model_len: int) -> None:
        self._decoder = decoder
        self._kv_pool = kv_pool
        self._decode_step = DecodeStep(decoder.kernels, self._forward, kv_pool.spec.block_size, max_model_len)

    @property
    def decode_step(self) -> DecodeStep:
        return self._decode_step

    def run(self, rows: Sequence[Row]) -> Tensor:
        """Hidden states of all rows' tokens, laid end to end: [num_tokens, hidden_size]. Valid until the next run."""
        if len(rows) <= MAX_DECODE_STEP_SEQS and all(len(row.token_ids) == 1 for row in rows):
            return self._decode_step.run([(row.token_ids[0], row.start, row.block_table) for row in rows])
        return self._forward(build_forward_batch(rows, self._kv_pool.spec.block_size))

    def logits(self, hidden_states: Tensor) -> Tensor:
        """[num_rows, vocab_size] float32."""
        return self._decoder.compute_logits(hidden_states)

    # Not around a whole step: a replayed one has nothing that torch could track, and entering the mode costs as much as
    # several ops do.
    @torch.inference_mode()
    def _forward(self, batch: ForwardBatch) -> Tensor:
        return self._decoder.run_layers(self._decoder.embed(batch), batch, self._kv_pool.layers)


def build_forward_batch(rows: Sequence[Row], block_size: int) -> ForwardBatch:
    positions = [np.arange(row.start, row.stop, dtype=np.int64) for row in rows]
    slots = [
        row.block_table[position // block_size] * np.int64(block_size) + position % block_size
        for row, position in zip(rows, positions, strict=True)
    ]
    tables = np.full((len(rows), max(len(row.block_table) for row in rows)), -1, dtype=np.int32)
    for row, table in zip(rows, tables, strict=True):
        table[: len(row.block_table)] = row.block_table
    cu_seqlens_q = np.zeros(len(rows) + 1, dtype=np.int32)
    np.cumsum([len(row.token_ids) for row in rows], out=cu_seqlens_q[1:])
    return ForwardBatch(
        input_ids=torch.tensor([token_id for row in rows for token_id in row.token_ids], dtype=torch.int64),
        positions=torch.from_numpy(np.concatenate(positions)),
        slot_mapping=torch.from_numpy(np.concatenate(slots)),
        block_tables=torch.from_numpy(tables),
        context_lens=torch.tensor([row.stop for row in rows], dtype=torch.int32),
        cu_seqlens_q=torch.from_numpy(cu_seqlens_q),
    )
