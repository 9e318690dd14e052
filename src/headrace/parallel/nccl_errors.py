"""What a failed exchange over NCCL means to whoever runs the engine."""

_SIGNS_OF_NO_MEMORY = ("out of memory", "Failed to CUDA")
"""NCCL says "Cuda failure 2 'out of memory'", or "Failed to CUDA calloc async 608 bytes"."""

_MAX_CHARACTERS = 200


def explain_nccl(error: RuntimeError) -> str:
    """What NCCL says, and what to do. torch puts first where in its code it was told, and NCCL's own reason last."""
    said = str(error)
    reason = " ".join(said.rpartition("Last error:")[2].split())[:_MAX_CHARACTERS]
    if not any(sign in said for sign in _SIGNS_OF_NO_MEMORY):
        return f"{reason}; NCCL_DEBUG=WARN says more"
    return (
        f"{reason}; NCCL found no memory beside what the engine holds: lower memory_fraction, or end what else uses "
        "that GPU"
    )
