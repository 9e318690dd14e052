"""Rows of token ids and block tables, as a step's forward pass takes them."""

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from headrace.batch import ForwardBatch
from headrace.cache.kv_share import KvShare
from headrace.engine.packed_arrays import ArraySpec, PackedArrays
from headrace.kernels import NOT_STORED

_CPU = torch.device("cpu")


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


def build_forward_batch(
    rows: Sequence[Row], block_size: int, share: KvShare | None = None, device: torch.device = _CPU
) -> ForwardBatch:
    """share: the blocks this rank has, if not all. device: where the batch shall lie."""
    num_tokens = sum([len(row.token_ids) for row in rows])
    width = max(len(row.block_table) for row in rows)
    arrays = PackedArrays(batch_specs(num_tokens, len(rows), width, is_shared=share is not None), device)
    host = arrays.host
    host["block_tables"].fill(-1)
    host["cu_seqlens_q"][:] = [0, *accumulate(len(row.token_ids) for row in rows)]
    for i, row in enumerate(rows):
        part = slice(*host["cu_seqlens_q"][i : i + 2])
        positions = np.arange(row.start, row.stop, dtype=np.int64)
        host["input_ids"][part] = row.token_ids
        host["positions"][part] = positions
        host["slot_mapping"][part] = _slots(row, positions, block_size, share)
        host["context_lens"][i] = row.stop
        _write_table(host, i, row.block_table, share)
    arrays.send()
    return ForwardBatch(**arrays.device)


def batch_specs(num_tokens: int, num_seqs: int, width: int, *, is_shared: bool) -> dict[str, ArraySpec]:
    """What a `ForwardBatch` is made of, tables last. width: blocks of the longest context; is_shared: ranks share
    contexts."""
    specs = {name: ArraySpec((num_tokens,), np.int64) for name in ("input_ids", "positions", "slot_mapping")}
    specs["context_lens"] = ArraySpec((num_seqs,), np.int32)
    specs["cu_seqlens_q"] = ArraySpec((num_seqs + 1,), np.int32)
    if is_shared:
        specs["owned_blocks"] = ArraySpec((num_seqs, width + 1), np.int32)
    specs["block_tables"] = ArraySpec((num_seqs, width), np.int32)
    return specs


def _slots(row: Row, positions: NDArray[np.int64], block_size: int, share: KvShare | None) -> NDArray[np.int64]:
    blocks = row.block_table[positions // block_size].astype(np.int64)
    if share is None:
        return blocks * block_size + positions % block_size
    slots = blocks // share.world_size * block_size + positions % block_size
    return np.where(blocks % share.world_size == share.rank, slots, NOT_STORED)


def _write_table(
    host: dict[str, NDArray[np.int32]], i: int, block_table: NDArray[np.int32], share: KvShare | None
) -> None:
    if share is not None:
        block_table, counts = share.local_table(block_table)
        host["owned_blocks"][i, : len(counts)] = counts
    host["block_tables"][i, : len(block_table)] = block_table
