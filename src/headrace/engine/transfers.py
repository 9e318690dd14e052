"""Small arrays between the host and a device."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def upload(array: NDArray[np.generic], device: torch.device) -> Tensor:
    """A copy in stream order, which nobody waits for; on the CPU the array itself.

    From pinned memory: torch waits for a copy from any other, and so for all that the stream has to do before it. It
    keeps the memory until the copy is over.
    """
    host = torch.from_numpy(array)
    return host if device.type == "cpu" else host.pin_memory().to(device, non_blocking=True)


def download(tensors: Sequence[Tensor]) -> list[NDArray[np.int32]]:
    """int32 tensors as arrays of the same shapes: one copy, which is waited for once."""
    words = torch.cat([tensor.reshape(-1) for tensor in tensors]).cpu().numpy()
    ends = np.cumsum([tensor.numel() for tensor in tensors])
    return [part.reshape(tensor.shape) for part, tensor in zip(np.split(words, ends[:-1]), tensors, strict=True)]
