"""Instruction sets and threads of the native kernels."""

from functools import cache
from hashlib import sha256
from pathlib import Path

import torch

from headrace import _native
from headrace.errors import BackendUnavailable


def supported_targets() -> tuple[str, ...]:
    """Instruction sets that this build has kernels for and this machine can run, the best one last."""
    return tuple(_native.supported_targets())


def best_target() -> str:
    """The fastest instruction set that this build has kernels for and this machine can run."""
    return _native.best_target()


def has_float16_tiles(target: str) -> bool:
    """Whether there are two ways to multiply integer weights, one of them for many rows."""
    return target == "amx_fp16"


def check_target(target: str) -> None:
    """
    Raises:
        BackendUnavailable: an instruction set this build or this machine does not have.
    """
    if target not in supported_targets():
        why = "this machine cannot run it" if target in _native.compiled_targets() else "this build does not have it"
        raise BackendUnavailable(f"instruction set '{target}': {why}; allowed: {', '.join(supported_targets())}")


def native_target(name: str) -> _native.Target:
    """
    Raises:
        BackendUnavailable: an instruction set this build or this machine does not have.
    """
    check_target(name)
    return _native.target_from_name(name)


@cache
def kernels_digest() -> str:
    """Of the compiled kernels: other kernels, other measurements."""
    assert _native.__file__ is not None
    return sha256(Path(_native.__file__).read_bytes()).hexdigest()[:16]


def set_num_threads(num_threads: int) -> None:
    """Threads of the native pool, for the whole process. Torch, which is left the small things, gets one: a second pool
    would fight for the same cores."""
    _native.set_num_threads(num_threads)
    torch.set_num_threads(1)
