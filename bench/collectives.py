"""What an all-reduce between processes of this host costs: `python -m bench.collectives`.

Calls follow each other without anything in between, launched from a recording as a decode step does, so that a figure
is a lower bound of what a call costs between layers. Medians over rounds; each round waits for the slowest rank.
"""

import argparse
import os
import statistics
import time
from collections.abc import Sequence

import torch

from headrace.kernels import KernelChoice, resolve_kernels
from headrace.parallel.native_group import NativeGroup, _native
from headrace.parallel.shm import make_communicator

_SIZES = (4 << 10, 16 << 10, 64 << 10, 256 << 10, 2 << 20)
_RING_BYTES = 256 << 10
_ROUNDS = 15
_ROUND_S = 0.02


def measure(communicator: _native.Communicator, algorithm: str | None) -> list[float]:
    """Seconds of one call, for each size."""
    return [_measure(communicator, num_bytes, algorithm) for num_bytes in _SIZES]


def _measure(communicator: _native.Communicator, num_bytes: int, algorithm: str | None) -> float:
    kernels = resolve_kernels(KernelChoice.CPU)
    group = NativeGroup(communicator, "tp", range(communicator.world_size), kernels.stream)
    x = torch.zeros(num_bytes // 2, dtype=torch.bfloat16)
    native = kernels.stream.native

    def record(count: int):
        native.begin_capture()
        for _ in range(count):
            if algorithm is None:
                group.all_reduce(x, "bench")
            else:
                _all_reduce(group, native, x, _native.Algorithm[algorithm])
        return native.end_capture().launch

    def seconds(launch) -> float:
        started = time.perf_counter()
        launch()
        return time.perf_counter() - started

    once = record(20)
    # All ranks must agree on a number of calls, so it comes from the slowest one's figure.
    slowest = torch.tensor([statistics.median(seconds(once) for _ in range(3)) / 20])
    count = max(2, min(1000, int(_ROUND_S / max(float(t) for t in group.all_gather(slowest, "bench")))))
    launch = record(count)
    return statistics.median(seconds(launch) for _ in range(_ROUNDS)) / count


def _all_reduce(group: NativeGroup, stream, x, algorithm) -> None:
    channel = group._group.channel(_native.Operation.ALL_REDUCE, "bench")
    bfloat16 = _native.DType.BFLOAT16
    group._group.all_reduce(stream, channel, algorithm, bfloat16, 1, x.numel(), x.data_ptr(), x.data_ptr(), bfloat16)


def over_shared_memory(world_size: int, algorithm: str | None) -> list[float]:
    region = _native.SharedRegion(world_size, _RING_BYTES)
    children = []
    for rank in range(1, world_size):
        if (pid := os.fork()) == 0:
            measure(make_communicator(region, rank), algorithm)
            os._exit(0)
        children.append(pid)
    seconds = measure(make_communicator(region, 0), algorithm)
    for pid in children:
        os.waitpid(pid, 0)
    return seconds


def print_table(rows: Sequence[tuple[str, Sequence[float]]]) -> None:
    names = [f"{size >> 10} KiB" if size < 1 << 20 else f"{size >> 20} MiB" for size in _SIZES]
    print(f"{'us per all-reduce of':<36}" + "".join(f"{name:>10}" for name in names))
    for name, seconds in rows:
        print(f"{name:<36}" + "".join(f"{1e6 * s:>10.1f}" for s in seconds))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--algorithm", choices=["DIRECT", "TWO_SHOT"], nargs="*", default=[None])
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for world_size in args.ranks:
        for algorithm in args.algorithm:
            name = f"shared memory, {world_size} ranks" + ("" if algorithm is None else f", {algorithm.lower()}")
            rows.append((name, over_shared_memory(world_size, algorithm)))
    print_table(rows)


if __name__ == "__main__":
    main()
