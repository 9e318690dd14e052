"""Rows of token ids and block tables, as a step's forward pass takes them."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from headrace.batch import ForwardBatch
from headrace.cache.kv_share import KvShare
from headrace.kernels import NOT_STORED


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


def build_forward_batch(rows: Sequence[Row], block_size: int, share: KvShare | None = None) -> ForwardBatch:
    """share: the blocks this rank has, if not all."""
    positions = [np.arange(row.start, row.stop, dtype=np.int64) for row in rows]
    tables, owned_blocks = _tables(rows, share)
    cu_seqlens_q = np.zeros(len(rows) + 1, dtype=np.int32)
    np.cumsum([len(row.token_ids) for row in rows], out=cu_seqlens_q[1:])
    slots = [_slots(row, position, block_size, share) for row, position in zip(rows, positions, strict=True)]
    return ForwardBatch(
        input_ids=torch.tensor([token_id for row in rows for token_id in row.token_ids], dtype=torch.int64),
        positions=torch.from_numpy(np.concatenate(positions)),
        slot_mapping=torch.from_numpy(np.concatenate(slots)),
        block_tables=torch.from_numpy(tables),
        context_lens=torch.tensor([row.stop for row in rows], dtype=torch.int32),
        cu_seqlens_q=torch.from_numpy(cu_seqlens_q),
        owned_blocks=None if owned_blocks is None else torch.from_numpy(owned_blocks),
    )


def _slots(row: Row, positions: NDArray[np.int64], block_size: int, share: KvShare | None) -> NDArray[np.int64]:
    blocks = row.block_table[positions // block_size].astype(np.int64)
    if share is None:
        return blocks * block_size + positions % block_size
    slots = blocks // share.world_size * block_size + positions % block_size
    return np.where(blocks % share.world_size == share.rank, slots, NOT_STORED)


def _tables(rows: Sequence[Row], share: KvShare | None) -> tuple[NDArray[np.int32], NDArray[np.int32] | None]:
    """block_tables and owned_blocks of a `ForwardBatch`."""
    width = max(len(row.block_table) for row in rows)
    tables = np.full((len(rows), width), -1, dtype=np.int32)
    if share is None:
        for row, table in zip(rows, tables, strict=True):
            table[: len(row.block_table)] = row.block_table
        return tables, None
    owned_blocks = np.zeros((len(rows), width + 1), dtype=np.int32)
    for row, table, owned in zip(rows, tables, owned_blocks, strict=True):
        local, counts = share.local_table(row.block_table)
        table[: len(local)] = local
        owned[: len(counts)] = counts
    return tables, owned_blocks
