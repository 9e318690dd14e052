"""Kernels whose passes are recorded without a GPU: a stand-in for CUDA graphs, to try what stands around them."""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from headrace.kernels import KernelChoice, Kernels, Recording, resolve_kernels
from headrace.kernels.ops import T

NUM_WARM_UPS = 2


def record(forward: Callable[[], T]) -> tuple[T, Recording]:
    """Run `forward` as often as capturing a CUDA graph does: to warm up, and to capture. A replay runs it again, into
    the tensors that the captured pass returned."""
    for _ in range(NUM_WARM_UPS):
        forward()
    out = forward()

    @torch.inference_mode()
    def replay() -> None:
        for mine, its in zip(_tensors(out), _tensors(forward()), strict=True):
            mine.copy_(its)

    return out, Recording(replay=replay, num_ops=1)


def with_recordings(kernels: Kernels) -> Kernels:
    return replace(kernels, record=record)


def with_padded_recordings(kernels: Kernels) -> Kernels:
    """Of a few sizes, made at start, as on a GPU. By the reference, which computes nothing for rows that pad a step."""
    return replace(resolve_kernels(KernelChoice.REFERENCE), record=record, pads_steps=True)


def without_recordings(kernels: Kernels) -> Kernels:
    """Native recordings notice what torch computes in between, and no exchange that leaves nothing to compute."""
    return replace(kernels, record=lambda forward: (forward(), Recording(obstacle="every op is called")))


def _tensors(out: object) -> tuple[Tensor, ...]:
    return out if isinstance(out, tuple) else (out,)  # type: ignore[return-value]
