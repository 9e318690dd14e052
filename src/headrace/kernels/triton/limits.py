"""What a GPU offers to one program, one multiprocessor and all of them."""

from dataclasses import dataclass, replace

import torch

from headrace.kernels.triton.launch import is_interpreted


@dataclass(frozen=True, kw_only=True)
class DeviceLimits:
    """
    shared_bytes: shared memory (LDS on AMD) of a multiprocessor; program_shared_bytes: the most of one program.
    lanes: of a warp.
    gemv_rows: rows of W for one program of GEMV, whose registers hold as many loads.
    """

    num_multiprocessors: int
    shared_bytes: int
    program_shared_bytes: int
    l2_bytes: int
    lanes: int
    gemv_rows: int = 8

    @property
    def min_product_rows(self) -> int:
        """The short side of a tensor core's product: 8 on NVIDIA's, 16 on AMD's, whose warps have 64 lanes."""
        return 8 if self.lanes == 32 else 16

    @property
    def adds_parts_up(self) -> bool:
        """Whether the last program of several may add up what all have left (`split_k`). Not on AMD's: there a barrier
        does not wait for stores, nor one wave's release for those of another, and parts might be missed."""
        return self.lanes == 32


H100 = DeviceLimits(
    num_multiprocessors=132,
    shared_bytes=228 * 2**10,
    program_shared_bytes=227 * 2**10,
    l2_bytes=50 * 2**20,
    lanes=32,
)
"""NVIDIA H100 SXM, as its data sheet has it."""

INTERPRETER = replace(H100, num_multiprocessors=1, gemv_rows=64)
"""Programs run one after another, each of them slowly, so that few large ones are best."""


def device_limits(device: torch.device) -> DeviceLimits:
    if is_interpreted():
        return INTERPRETER
    found = torch.cuda.get_device_properties(device)
    program_shared_bytes = getattr(found, "shared_memory_per_block_optin", found.shared_memory_per_block)
    return DeviceLimits(
        num_multiprocessors=found.multi_processor_count,
        shared_bytes=found.shared_memory_per_multiprocessor,
        program_shared_bytes=program_shared_bytes,
        l2_bytes=found.L2_cache_size,
        lanes=found.warp_size,
    )
