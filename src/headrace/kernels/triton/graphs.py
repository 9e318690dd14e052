"""Forward passes as one call: CUDA graphs, which torch has on AMD's GPUs too."""

from collections.abc import Callable, Iterator
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor

from headrace.kernels.capturing import capturing
from headrace.kernels.ops import Recording, T


class GraphRecorder:
    """Captures passes on one device. All graphs share one pool of memory: what a pass needs in between is free for
    the next one, as only one runs at a time; what it returns stays its own.

    A pass may read what lies still (weights, caches, the inputs of a step) and must not look at a tensor on the host.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool: Any = None
        self._stream: torch.cuda.Stream | None = None
        self._alive: WeakSet[torch.cuda.CUDAGraph] = WeakSet()

    def record(self, forward: Callable[[], T]) -> tuple[T, Recording]:
        """Run `forward` and capture it; what it returns is at once valid, and again after each replay.

        It is called twice. The first call computes, and compiles and loads what is missing, which cannot be captured.
        The second one only queues. So ranks exchange in this what they exchange in one pass, also where the device has
        no room for the graph.

        Raises:
            torch.OutOfMemoryError: there is no room for the pass itself.
        """
        computed = forward()
        graph = torch.cuda.CUDAGraph()
        try:
            captured = self._capture(graph, forward)
        except torch.OutOfMemoryError:
            return computed, Recording(obstacle="the device has no memory left to record it")
        except RuntimeError as error:
            return computed, Recording(obstacle=_first_line(error))
        with torch.inference_mode():
            for there, here in zip(_tensors(captured), _tensors(computed), strict=True):
                there.copy_(here)
        return captured, Recording(replay=graph.replay)

    def _capture(self, graph: torch.cuda.CUDAGraph, forward: Callable[[], T]) -> T:
        if self._stream is None:
            self._stream = torch.cuda.Stream(self._device)
        if not self._alive:
            # torch takes no pool whose graphs have all gone.
            self._pool = torch.cuda.graph_pool_handle()
        with capturing(graph, pool=self._pool, stream=self._stream):
            captured = forward()
        self._alive.add(graph)
        return captured


def _tensors(value: Any) -> Iterator[Tensor]:
    """Those that a pass returned, in order."""
    if isinstance(value, Tensor):
        yield value
    else:
        for part in value:
            yield from _tensors(part)


def _first_line(error: RuntimeError) -> str:
    return f"it cannot be captured: {str(error).partition(chr(10))[0][:200]}"
