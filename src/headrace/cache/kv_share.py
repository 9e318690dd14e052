"""Which blocks of the KV cache a rank holds, where several ranks hold one KV head between them."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, kw_only=True)
class KvShare:
    """Block `id` belongs to rank id % world_size of those that share, where it is block id // world_size.

    So a block's owner depends on its id alone, and whoever gives blocks to sequences need not know of ranks: prefixes
    that are shared, sequences that start over and blocks in any order keep their owners, and each rank's pool needs
    1 / world_size of the blocks. What it costs: the ranks' shares of one context may differ in size. A sequence that
    takes consecutive ids is dealt out evenly.
    """

    rank: int
    world_size: int

    def num_local_blocks(self, num_blocks: int) -> int:
        """Blocks in the pool of each rank, the same on all: ceil(num_blocks / world_size)."""
        return -(-num_blocks // self.world_size)

    def local_block(self, block_id: int) -> int | None:
        """Where this rank has a block; None if another rank does."""
        block, owner = divmod(block_id, self.world_size)
        return block if owner == self.rank else None

    def local_table(self, block_table: NDArray[np.int32]) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """A sequence's blocks that this rank has, as it numbers them, and how many of those are among the first i.

        Shapes:
            block_table: [num_blocks]
            returns:     [num_local_blocks], [num_blocks + 1]
        """
        is_mine = block_table % self.world_size == self.rank
        counts = np.zeros(len(block_table) + 1, dtype=np.int32)
        np.cumsum(is_mine, out=counts[1:])
        return block_table[is_mine] // np.int32(self.world_size), counts
