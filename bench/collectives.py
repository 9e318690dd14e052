"""What an all-reduce between processes of one host costs, by shared memory and by MPI: `python -m bench.collectives`.

Calls follow each other without anything in between, launched from a recording as a decode step does, so that a figure
is a lower bound of what a call costs between layers. Medians over rounds; each round waits for the slowest rank.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from headrace.kernels import KernelChoice, resolve_kernels
from headrace.parallel import mpi, shm
from headrace.parallel.native_group import NativeGroup, _native

_SIZES = (4 << 10, 8 << 10, 16 << 10, 64 << 10, 256 << 10, 2 << 20)
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
            measure(shm.make_communicator(region, rank), algorithm)
            os._exit(0)
        children.append(pid)
    seconds = measure(shm.make_communicator(region, 0), algorithm)
    for pid in children:
        os.waitpid(pid, 0)
    return seconds


def over_mpi(world_size: int, algorithm: str | None) -> list[float]:
    """In processes that mpiexec starts; it lies beside this Python where it came as a wheel."""
    mpiexec = Path(sys.executable).parent / "mpiexec"
    command = [str(mpiexec if mpiexec.exists() else "mpiexec"), "-n", str(world_size)]
    command += [sys.executable, "-m", "bench.collectives", "--as-mpi-rank"]
    if algorithm is not None:
        command += ["--algorithm", algorithm]
    out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    seconds: list[float] = json.loads(out)
    return seconds


def run_mpi_rank(algorithm: str | None) -> None:
    communicator = mpi.make_communicator()
    seconds = measure(communicator, algorithm)
    if communicator.rank == 0:
        print(json.dumps(seconds))


def print_table(rows: Sequence[tuple[str, Sequence[float]]]) -> None:
    names = [f"{size >> 10} KiB" if size < 1 << 20 else f"{size >> 20} MiB" for size in _SIZES]
    print(f"{'us per all-reduce of':<24}" + "".join(f"{name:>10}" for name in names))
    for name, seconds in rows:
        print(f"{name:<24}" + "".join(f"{1e6 * s:>10.1f}" for s in seconds))


_TRANSPORTS = {"mpi": over_mpi, "shm": over_shared_memory}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--algorithm", choices=["DIRECT", "TWO_SHOT"], help="by the size of the message if not given")
    parser.add_argument("--transport", choices=sorted(_TRANSPORTS), nargs="+", default=sorted(_TRANSPORTS))
    parser.add_argument("--as-mpi-rank", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.as_mpi_rank:
        run_mpi_rank(args.algorithm)
        return
    rows = [
        (f"{transport}, {world_size} ranks", _TRANSPORTS[transport](world_size, args.algorithm))
        for transport in args.transport
        for world_size in args.ranks
    ]
    print_table(rows)


if __name__ == "__main__":
    main()
