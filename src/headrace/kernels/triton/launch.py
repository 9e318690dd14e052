"""What every launch of a Triton kernel needs to know."""

import os

import torch
import triton

from headrace.errors import BackendUnavailable

# Fused multiply-adds are Triton's default up to 3.9, which warns of a change. Asked for by name they stay.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")


def is_interpreted() -> bool:
    """Whether kernels run in Triton's interpreter (TRITON_INTERPRET=1), on tensors in the CPU's memory."""
    return bool(triton.knobs.runtime.interpret)


def is_ptx() -> bool:
    """Whether kernels are compiled for NVIDIA's GPUs, and so may hold instructions of theirs."""
    return torch.version.cuda is not None and not is_interpreted()


def check_device(device: torch.device) -> None:
    """
    Raises:
        BackendUnavailable: Triton kernels cannot read this device's memory.
    """
    if device.type == "cuda" and not is_interpreted():
        return
    if device.type == "cpu" and is_interpreted():
        return
    if is_interpreted():
        raise BackendUnavailable(
            f"TRITON_INTERPRET=1 runs kernels on the CPU, but the model lies on {device}; unset it"
        )
    raise BackendUnavailable(
        f"Triton kernels need a GPU, but the model lies on {device}; "
        "put it on 'cuda', or set TRITON_INTERPRET=1 to run them in Triton's interpreter, for tests"
    )


def num_multiprocessors(device: torch.device) -> int:
    """Of a GPU; in the interpreter three, so that programs have several pieces of work each, as on a GPU."""
    if device.type != "cuda":
        return 3
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def has_warpgroup_products(device: torch.device) -> bool:
    """Whether four warps multiply together, out of shared memory: NVIDIA's from Hopper on."""
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(device) >= (9, 0)
