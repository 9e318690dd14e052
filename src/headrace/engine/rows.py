"""Rows of token ids and block tables, as a step's forward pass takes them."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from headrace.batch import ForwardBatch


class Row(NamedTuple):
    """New tokens of one sequence: positions start, start + 1, ...; block_table covers them and all before. A table that
    has changed comes as another array.

    Shapes: block_table [num_blocks] int32
    """

    token_ids: Sequence[int]
    start: int
    block_table: NDArray[np.int32]

    @property
    def stop(self) -> int:
        return self.start + len(self.token_ids)


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
