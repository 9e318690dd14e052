"""What this GPU does at best, to compare everything else with."""

from __future__ import annotations

import time
from collections.abc import Iterator

import torch

from headrace.config import WeightFormat
from scripts.gpu_check.context import Context
from scripts.gpu_check.figures import Figure

_NUM_LAUNCHES = 200


def measure(context: Context) -> Iterator[Figure]:
    yield from _bandwidth(context)
    yield from _products(context)
    yield from _launches(context)


def _bandwidth(context: Context) -> Iterator[Figure]:
    """A copy counts the bytes read and the bytes written."""
    num_entries = context.scale.read_buffer_bytes // 4
    source = context.randn(num_entries, dtype=torch.float32)
    target = torch.empty_like(source)
    times = context.race({"copy": [lambda: target.copy_(source)], "sum": [source.sum]})
    seconds = source.nbytes / context.kernels.machine.read_bytes_per_s(source.nbytes)
    yield _limit("read or copy", seconds, num_bytes=source.nbytes)
    for name, num_bytes in (("copy", 2 * source.nbytes), ("sum", source.nbytes)):
        if name in times:
            yield _limit(name, times[name].best_s, num_bytes=num_bytes)


def _products(context: Context) -> Iterator[Figure]:
    for weight_format in (WeightFormat.BFLOAT16, WeightFormat.FLOAT32):
        name, ops_per_s = context.kernels.machine.multiply_ops_per_s(weight_format)
        yield _limit(f"multiply {name}", 1.0, num_ops=int(ops_per_s))


def _launches(context: Context) -> Iterator[Figure]:
    """What the host needs to ask for a small kernel, and the device from one in a graph to the next."""
    x = context.randn(16, dtype=torch.float32)
    times = context.race({"small kernel in a graph": [lambda: x.add_(1)]})
    for name, found in times.items():
        yield _limit(name, found.best_s)
    context.synchronize()
    start = time.perf_counter()
    for _ in range(_NUM_LAUNCHES):
        x.add_(1)
    yield _limit("asking for a kernel", (time.perf_counter() - start) / _NUM_LAUNCHES)


def _limit(name: str, seconds: float, *, num_bytes: int = 0, num_ops: int = 0) -> Figure:
    return Figure(group="limit", labels={"name": name}, seconds=seconds, num_bytes=num_bytes, num_ops=num_ops)
