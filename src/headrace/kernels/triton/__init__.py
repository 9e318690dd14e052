"""Ops in Triton, for GPUs; Triton's interpreter runs the same code on a CPU, for tests.

Importing this package imports Triton; where that fails, `kernels.dispatch` says so.
"""

from collections.abc import Callable
from typing import Any

import torch

from headrace.kernels.triton.launch import check_device

__all__ = ["check_device", "make_ops"]


def make_ops(device: torch.device) -> dict[str, Callable[..., Any]]:  # noqa: ARG001
    """The ops that are written in Triton, by name, for tensors on a device."""
    return {}
