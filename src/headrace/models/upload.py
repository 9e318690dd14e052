"""The way of a checkpoint's blocks to the device that the model lies on."""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

Upload = Callable[[Tensor], Tensor]
"""From a block of a checkpoint, a view of its file, to the same on the device."""

_NUM_BUFFERS = 2
"""While one is on its way, the other one is filled."""


class _Event(Protocol):
    def record(self) -> None: ...

    def synchronize(self) -> None: ...


def make_upload(device: torch.device) -> Upload:
    return _stay if device.type == "cpu" else StagedUpload(device)


def _stay(block: Tensor) -> Tensor:
    return block


class StagedUpload:
    """Copies blocks through two pinned buffers on the host, as the device reads pinned memory alone at full speed, and
    while the host does something else.

    What follows on the current stream finds a block whole. Types are converted there, not here.
    """

    def __init__(
        self, device: torch.device, *, pin_memory: bool = True, make_event: Callable[[], _Event] = torch.cuda.Event
    ) -> None:
        self._device, self._pin_memory = device, pin_memory
        self._buffers = [torch.empty(0, dtype=torch.uint8) for _ in range(_NUM_BUFFERS)]
        self._has_left = [make_event() for _ in range(_NUM_BUFFERS)]
        self._turn = 0

    def __call__(self, block: Tensor) -> Tensor:
        turn, self._turn = self._turn, (self._turn + 1) % _NUM_BUFFERS
        self._has_left[turn].synchronize()
        if self._buffers[turn].nbytes < block.nbytes:
            self._buffers[turn] = torch.empty(block.nbytes, dtype=torch.uint8, pin_memory=self._pin_memory)
        staged = self._buffers[turn][: block.nbytes].view(block.dtype).view(block.shape)
        staged.copy_(block)
        on_device = torch.empty(block.shape, dtype=block.dtype, device=self._device)
        on_device.copy_(staged, non_blocking=True)
        self._has_left[turn].record()
        return on_device
