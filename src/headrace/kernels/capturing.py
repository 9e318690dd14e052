"""What every capture of a CUDA graph has to mind."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def capturing(graph: torch.cuda.CUDAGraph, **how: Any) -> Iterator[None]:
    """`torch.cuda.graph`, after which nothing is left of the capture but the graph, also where it fails.

    An op that waits for the device raises a RuntimeError before it would break the capture, which torch up to 2.11 does
    not recover from. Where a capture ends with an error, torch leaves its stream the current one: not here. Other
    threads (NCCL's watch over its exchanges, say) may go on using the device meanwhile.

    cuBLAS's workspace comes out of the graph's memory, and torch would keep it for the stream for good, and with it all
    memory of graphs that are gone.
    """
    stream = torch.cuda.current_stream()
    torch._C._cuda_clearCublasWorkspaces()
    try:
        with (
            torch.cuda.stream(stream),
            torch.cuda.graph(graph, capture_error_mode="thread_local", **how),
            _refusing_to_wait(),
        ):
            yield
    finally:
        torch._C._cuda_clearCublasWorkspaces()


@contextmanager
def _refusing_to_wait() -> Iterator[None]:
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        # torch warns once that the mode is a prototype, which misses some such ops.
        warnings.simplefilter("ignore")
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)
