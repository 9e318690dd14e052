"""The blocks of one sequence, as an array that grows."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


class BlockTable:
    """Block ids in order. `ids` is a view: each `extend` and `clear` makes another one, and the old one invalid."""

    __slots__ = ("_buffer", "ids")

    def __init__(self) -> None:
        self._buffer = np.empty(16, dtype=np.int32)
        self.ids: NDArray[np.int32] = self._buffer[:0]

    def extend(self, block_ids: Sequence[int]) -> None:
        old_size = len(self.ids)
        size = old_size + len(block_ids)
        if size > len(self._buffer):
            self._buffer = np.resize(self._buffer, max(size, 2 * len(self._buffer)))
        self._buffer[old_size:size] = block_ids
        self.ids = self._buffer[:size]

    def clear(self) -> None:
        self.ids = self._buffer[:0]
