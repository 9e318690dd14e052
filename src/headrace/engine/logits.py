"""Rows of logits between the model and the sampler."""

from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from headrace.engine.draw import Row
from headrace.engine.logprobs import float32_row
from headrace.engine.transfers import download
from headrace.errors import ShapeError


class Largest(NamedTuple):
    """Of each row the first id of its largest logit, and that one; NaN counts as largest.

    As arrays, or as views of memory that the next step writes to, which are read with less ado.

    Shapes: both [num_rows], int64 and float32
    """

    token_ids: NDArray[np.int64] | memoryview
    logits: NDArray[np.float32] | memoryview


class DeviceLargest(NamedTuple):
    """`Largest` on a device that has not been waited for: `argmax` of logits, until the next step writes there.

    Shapes: both [num_rows], int64 and float32
    """

    token_ids: Tensor
    logits: Tensor


AnyLargest = Largest | DeviceLargest


class Logits(NamedTuple):
    """Rows of logits; `largest` where it was found while they were computed.

    Shapes: logits [num_rows, vocab_size] float32
    """

    logits: Tensor
    largest: AnyLargest | None = None


def on_host(largest: AnyLargest) -> Largest:
    """Waits for a device, whose copy is one."""
    if isinstance(largest, Largest):
        return largest
    token_ids, logits = download([part.view(torch.int32) for part in largest])
    return Largest(token_ids.view(np.int64), logits.view(np.float32))


class HostLogits:
    """Rows of logits as numpy reads them. Nothing is asked of torch before a row is."""

    def __init__(self, logits: Tensor) -> None:
        self._logits = logits
        self._fetched: dict[int, Row] = {}

    def fetch(self, indices: Sequence[int]) -> None:
        """Bring rows that will be asked for to the host in one copy, instead of waiting for each."""
        if indices and self._view is None and not self._logits.is_cpu:
            rows = self._logits.detach()[list(indices)].cpu()
            self._fetched |= dict(zip(indices, map(float32_row, rows), strict=True))

    def check(self, num_rows: int) -> None:
        """
        Raises:
            ShapeError: not num_rows rows of floating-point logits.
        """
        shape = tuple(self._logits.shape) if self._view is None else self._view.shape
        if len(shape) != 2 or shape[0] != num_rows or shape[1] == 0:
            raise ShapeError(f"logits are {shape} for {num_rows} sequences; want [num_rows, vocab_size]")
        if self._view is None and not self._logits.dtype.is_floating_point:
            raise ShapeError(f"logits are {self._logits.dtype}; want a float dtype")

    def row(self, index: int) -> Row:
        if self._view is None:
            found = self._fetched.get(index)
            return float32_row(self._logits[index].detach()) if found is None else found
        row: Row = self._view[index]
        return row

    def largest(self) -> list[tuple[int, float]]:
        """Each row's first id of its largest logit, and that logit. NaN counts as largest, so one look finds every
        unusable row."""
        if self._view is not None:
            return largest_on_host(self._view)
        logits = self._logits.detach()
        return largest_on_host(map(float32_row, logits)) if logits.is_cpu else largest_on_device(logits)

    @cached_property
    def _view(self) -> NDArray[np.float32] | None:
        """All rows at once; None where they must be fetched or converted, or where autograd tracks them.

        Trying is one call of torch, where asking for device, dtype and gradients first would be four.
        """
        try:
            view = self._logits.numpy()
        except (TypeError, RuntimeError):
            return None
        return view if view.dtype == np.float32 else None


def largest_on_host(rows: Iterable[Row]) -> list[tuple[int, float]]:
    return [(i := int(row.argmax()), float(row[i])) for row in rows]


def largest_on_device(logits: Tensor) -> list[tuple[int, float]]:
    """One small copy to the host; torch's argmax, too, documents that it gives the first of equals."""
    token_ids = logits.argmax(dim=-1)
    largest = on_host(DeviceLargest(token_ids, logits.gather(1, token_ids.unsqueeze(1)).squeeze(1).float()))
    return list(zip(largest.token_ids.tolist(), largest.logits.tolist(), strict=True))
