"""Arrays of numbers that the host fills and a device reads."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_ALIGNMENT_BYTES = 64


class ArraySpec(NamedTuple):
    shape: tuple[int, ...]
    dtype: type[np.int32] | type[np.int64]


class PackedArrays:
    """Named arrays in one piece of memory, one after another, so that one copy brings them all to a device.

    host: what the host writes. device: what ops read, in memory that stays where it is. On the CPU both are the same,
    and nothing needs to be sent.

    is_staged: the two are apart; None says so of a GPU alone.
    """

    def __init__(self, specs: Mapping[str, ArraySpec], device: torch.device, *, is_staged: bool | None = None) -> None:
        on_gpu = device.type != "cpu"
        self.is_staged = on_gpu if is_staged is None else is_staged
        starts, num_bytes = _lay_out(specs)
        self._starts = starts
        self._host = torch.zeros(num_bytes, dtype=torch.uint8, device="cpu", pin_memory=on_gpu)
        self._device = torch.zeros_like(self._host, device=device) if self.is_staged else self._host
        self._has_left = torch.cuda.Event() if on_gpu else None  # type: ignore[no-untyped-call]
        self.host: dict[str, NDArray[Any]] = {
            name: _part(self._host, starts[name], spec).numpy() for name, spec in specs.items()
        }
        self.device = {name: _part(self._device, starts[name], spec) for name, spec in specs.items()}

    def send(self, *, until: str | None = None, num_rows: int = 0) -> None:
        """Bring what the host has written to the device, in stream order, without waiting for it.

        until: arrays from this one on are left out, but for its first num_rows rows; None sends all.
        """
        if not self.is_staged:
            return
        end = None if until is None else self._starts[until] + self.host[until][:num_rows].nbytes
        self._device[:end].copy_(self._host[:end], non_blocking=True)
        if self._has_left is not None:
            self._has_left.record()

    def wait_until_sent(self) -> None:
        """What the host writes from now on does not change what was sent."""
        if self._has_left is not None:
            self._has_left.synchronize()


def _lay_out(specs: Mapping[str, ArraySpec]) -> tuple[dict[str, int], int]:
    """The first byte of each array, and how many there are in all."""
    starts, end = {}, 0
    for name, spec in specs.items():
        starts[name] = -(-end // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES
        end = starts[name] + _num_bytes(spec)
    return starts, end


def _num_bytes(spec: ArraySpec) -> int:
    return int(np.prod(spec.shape, dtype=np.int64)) * np.dtype(spec.dtype).itemsize


def _part(memory: Tensor, start: int, spec: ArraySpec) -> Tensor:
    dtype = torch.int64 if spec.dtype is np.int64 else torch.int32
    return memory[start : start + _num_bytes(spec)].view(dtype).view(spec.shape)
