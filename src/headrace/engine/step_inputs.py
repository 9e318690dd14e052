"""What decode steps read, in memory that stays where it is."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from headrace.batch import ForwardBatch
from headrace.cache.kv_share import KvShare
from headrace.costs.memory import num_blocks_for
from headrace.engine.packed_arrays import PackedArrays
from headrace.engine.rows import Row, batch_specs
from headrace.kernels import NOT_STORED


class StepInputs:
    """The inputs of one new token for each of up to max_num_seqs sequences.

    A step may have more rows than sequences. The others stand for nobody: they store nothing and see nothing, and what
    ops make of them nobody reads.

    share: the cache blocks this rank has, if not all.
    is_staged: see `PackedArrays`.
    """

    def __init__(
        self,
        *,
        max_num_seqs: int,
        block_size: int,
        max_model_len: int,
        share: KvShare | None,
        device: torch.device,
        is_staged: bool | None = None,
    ) -> None:
        self._block_size, self._share = block_size, share
        specs = batch_specs(
            max_num_seqs, max_num_seqs, num_blocks_for(max_model_len, block_size), is_shared=share is not None
        )
        self.arrays = PackedArrays(specs, device, is_staged=is_staged)
        # What is written for each sequence of each step, as views that are written to with less ado than arrays.
        host = self.arrays.host
        self._input_ids, self._positions = host["input_ids"].data, host["positions"].data
        self._slot_mapping, self._context_lens = host["slot_mapping"].data, host["context_lens"].data
        self._block_tables = host["block_tables"].data
        # Tables are long and grow once in many steps: else they are neither copied nor sent.
        self._first_table = "block_tables" if share is None else "owned_blocks"
        self._written_tables: list[NDArray[np.int32] | None] = [None] * max_num_seqs
        """What the rows of block_tables were copied from."""
        self.arrays.host["cu_seqlens_q"][:] = np.arange(max_num_seqs + 1)
        self.arrays.send()

    def fill(self, rows: Sequence[Row], num_rows: int) -> None:
        """Write a step's sequences, at most num_rows, and make the rows up to there stand for nobody."""
        arrays, share = self.arrays, self._share
        if arrays.is_staged:
            arrays.wait_until_sent()
        size, tables, has_new_table = self._block_size, self._written_tables, False
        for i, (token_ids, position, block_table) in enumerate(rows):
            if tables[i] is not block_table:
                self._write_table(i, block_table)
                tables[i] = block_table
                has_new_table = True
            self._input_ids[i] = token_ids[0]
            self._positions[i] = position
            self._context_lens[i] = position + 1
            if share is None:
                slot = self._block_tables[i, position // size] * size + position % size
            else:
                slot = self._local_slot(share, block_table.item(position // size), position % size)
            self._slot_mapping[i] = slot
        if len(rows) < num_rows:
            self._pad(len(rows), num_rows)
        if not arrays.is_staged:
            return
        if has_new_table:
            arrays.send(until="block_tables", num_rows=num_rows)
        else:
            arrays.send(until=self._first_table)

    def batch(self, num_rows: int) -> ForwardBatch:
        """The first rows of what was filled in, wherever that is done later."""
        parts = {name: array[:num_rows] for name, array in self.arrays.device.items()}
        return ForwardBatch(**(parts | {"cu_seqlens_q": self.arrays.device["cu_seqlens_q"][: num_rows + 1]}))

    def _pad(self, start: int, stop: int) -> None:
        """Their tables hold what they held, which nothing reads."""
        host, part = self.arrays.host, slice(start, stop)
        host["input_ids"][part] = 0
        host["positions"][part] = 0
        host["slot_mapping"][part] = NOT_STORED
        host["context_lens"][part] = 0

    def _local_slot(self, share: KvShare, block_id: int, offset: int) -> int:
        local_id = share.local_block(block_id)
        return NOT_STORED if local_id is None else local_id * self._block_size + offset

    def _write_table(self, i: int, block_table: NDArray[np.int32]) -> None:
        host = self.arrays.host
        if self._share is not None:
            # Counts of a table's blocks; those past its end are never read.
            block_table, counts = self._share.local_table(block_table)
            host["owned_blocks"][i, : len(counts)] = counts
        host["block_tables"][i, : len(block_table)] = block_table
