"""The blocks of one sequence, as an array that grows."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


class BlockTable:
    """Block ids in order. `ids` is a view: valid until the next `extend` or `clear`."""

    def __init__(self) -> None:
        self._buffer = np.empty(16, dtype=np.int32)
        self._size = 0

    @property
    def ids(self) -> NDArray[np.int32]:
        return self._buffer[: self._size]

    def extend(self, block_ids: Sequence[int]) -> None:
        size = self._size + len(block_ids)
        if size > len(self._buffer):
            self._buffer = np.resize(self._buffer, max(size, 2 * len(self._buffer)))
        self._buffer[self._size : size] = block_ids
        self._size = size

    def clear(self) -> None:
        self._size = 0
