"""What figures were measured on, and how much of its memory was used."""

import torch

from headrace.machine import cpu_name, peak_memory_bytes


def device_name(device: torch.device) -> str:
    """As its maker calls it."""
    return cpu_name() if device.type == "cpu" else torch.cuda.get_device_name(device)


def peak_bytes(device: torch.device) -> int:
    """The most memory of a device that this process has held at once; of a GPU, what torch has reserved there."""
    return peak_memory_bytes() if device.type == "cpu" else torch.cuda.max_memory_reserved(device)
