"""What this machine can do at best, measured now with the engine's threads: read memory and multiply matrices."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from headrace.config import WeightFormat
from headrace.kernels import Kernels
from headrace.machine import available_memory_bytes
from headrace.models.loading import WeightFormats

_BUFFER_BYTES = {"cpu": 512 * 2**20, "cuda": 2 * 2**30}
"""Larger than the last-level cache of any by enough that what stays in it does not matter."""


@dataclass(frozen=True, kw_only=True)
class MachineLimits:
    """read_gb_per_s: 1e9 bytes; multiply_gops: 1e9 operations a second, a multiply and an add counted as two.

    multiply_gops is by what is multiplied: the numbers a model's weights are multiplied as, and float32, which is the
    faster one on CPUs without instructions for the former.
    """

    read_gb_per_s: float
    read_buffer_bytes: int
    multiply_gops: dict[str, float]
    num_threads: int

    @property
    def best_gops(self) -> float:
        return max(self.multiply_gops.values())


def measure_limits(
    kernels: Kernels, formats: WeightFormats, num_threads: int, on_start: Callable[[str], None]
) -> MachineLimits:
    """Best of several passes each, on the threads that the kernels were given. Takes a few seconds."""
    on_start("limits: memory bandwidth")
    buffer_bytes = min(_BUFFER_BYTES[kernels.device.type], _available_bytes(kernels.device) // 4)
    read_bytes_per_s = kernels.machine.read_bytes_per_s(buffer_bytes)
    multiply_gops = {}
    for tried in dict.fromkeys((formats.linear, formats.dense, WeightFormat.FLOAT32)):
        on_start(f"limits: multiplication of {tried.value} weights")
        name, ops_per_s = kernels.machine.multiply_ops_per_s(tried)
        multiply_gops[name] = ops_per_s / 1e9
    return MachineLimits(
        read_gb_per_s=read_bytes_per_s / 1e9,
        read_buffer_bytes=buffer_bytes,
        multiply_gops=multiply_gops,
        num_threads=num_threads,
    )


def _available_bytes(device: torch.device) -> int:
    """Of a GPU's memory, what torch's allocator has reserved and not given out counts too."""
    if device.type == "cpu":
        return available_memory_bytes()
    free_bytes, _ = torch.cuda.mem_get_info(device)
    return free_bytes + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
