"""Forward passes as one call: CUDA graphs, which torch has on AMD's GPUs too."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

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

    def record(self, forward: Callable[[], T]) -> tuple[T, Recording]:
        """Run `forward` and capture it; what it returns is at once valid, and again after each replay.

        It is called twice. The first call computes, and compiles and loads what is missing, which cannot be captured.
        The second one only queues. So ranks exchange in this what they exchange in one pass.

        Raises:
            torch.OutOfMemoryError: there is no room for the pass, or for its graph.
        """
        computed = forward()
        graph = torch.cuda.CUDAGraph()
        try:
            captured = self._capture(graph, forward)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            return computed, Recording(obstacle=_first_line(error))
        with torch.inference_mode():
            for there, here in zip(_tensors(captured), _tensors(computed), strict=True):
                there.copy_(here)
        return captured, Recording(replay=graph.replay)

    def _capture(self, graph: torch.cuda.CUDAGraph, forward: Callable[[], T]) -> T:
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
            self._stream = torch.cuda.Stream(self._device)
        # Where a capture ends with an error, torch leaves its stream the current one. Other threads (NCCL's watch over
        # its exchanges, say) may go on using the device meanwhile.
        with (
            torch.cuda.stream(torch.cuda.current_stream(self._device)),
            torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"),
            _refusing_to_wait(),
        ):
            return forward()


@contextmanager
def _refusing_to_wait() -> Iterator[None]:
    """An op that waits for the device raises a RuntimeError, before it would break the capture."""
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        # torch warns once that the mode is a prototype, which misses some such ops.
        warnings.simplefilter("ignore")
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def _tensors(value: Any) -> Iterator[Tensor]:
    """Those that a pass returned, in order."""
    if isinstance(value, Tensor):
        yield value
    else:
        for part in value:
            yield from _tensors(part)


def _first_line(error: RuntimeError) -> str:
    return f"it cannot be captured: {str(error).partition(chr(10))[0][:200]}"
