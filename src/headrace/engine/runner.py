"""Turns rows of token ids and block tables into one forward pass."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from headrace.batch import ForwardBatch
from headrace.cache.kv_pool import KvPool
from headrace.models.decoder import Decoder


@dataclass(frozen=True, kw_only=True)
class Row:
    """New tokens of one sequence: positions start, start + 1, ...; block_table covers them and all before."""

    token_ids: tuple[int, ...]
    start: int
    block_table: Sequence[int]

    @property
    def stop(self) -> int:
        return self.start + len(self.token_ids)


class ModelRunner:
    """One stage's decoder and the cache it writes to."""

    def __init__(self, decoder: Decoder, kv_pool: KvPool) -> None:
        self._decoder = decoder
        self._kv_pool = kv_pool

    def run(self, rows: Sequence[Row]) -> Tensor:
        """Hidden states of all rows' tokens, laid end to end: [num_tokens, hidden_size]."""
        batch = build_forward_batch(rows, self._kv_pool.spec.block_size)
        return self._decoder.run_layers(self._decoder.embed(batch), batch, self._kv_pool.layers)

    def logits(self, hidden_states: Tensor) -> Tensor:
        """[num_rows, vocab_size] float32."""
        return self._decoder.compute_logits(hidden_states)


def build_forward_batch(rows: Sequence[Row], block_size: int) -> ForwardBatch:
    input_ids = [token_id for row in rows for token_id in row.token_ids]
    positions = [position for row in rows for position in range(row.start, row.stop)]
    slots = [
        row.block_table[position // block_size] * block_size + position % block_size
        for row in rows
        for position in range(row.start, row.stop)
    ]
    width = max(len(row.block_table) for row in rows)
    tables = [[*row.block_table, *[-1] * (width - len(row.block_table))] for row in rows]
    return ForwardBatch(
        input_ids=torch.tensor(input_ids, dtype=torch.int64),
        positions=torch.tensor(positions, dtype=torch.int64),
        slot_mapping=torch.tensor(slots, dtype=torch.int64),
        block_tables=torch.tensor(tables, dtype=torch.int32),
        context_lens=torch.tensor([row.stop for row in rows], dtype=torch.int32),
        cu_seqlens_q=torch.tensor([0, *accumulate(len(row.token_ids) for row in rows)], dtype=torch.int32),
    )
