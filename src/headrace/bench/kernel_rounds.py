"""A kernel's time beside the least that this machine needs: bytes over bandwidth, or operations over the peak.

Weights and caches rotate through copies larger than any cache of the machine, as the layers of a model do. Each time is
the best of several calls in several rounds, so that what else the machine does meanwhile drops out. On shared machines
bandwidth and peaks change from one second to the next: both are measured beside each kernel, in the same rounds. On a
GPU a time is that of one call among many that the device works off without a gap, see `kernels.timing`.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from enum import Enum
from functools import partial

from headrace.config import WeightFormat
from headrace.kernels import Kernels
from headrace.kernels.timing import TimedCalls, time_calls

_WORKING_SET_BYTES = 256 * 2**20
_NUM_ROUNDS = 3
_MIN_CALLS, _MIN_S = 5, 0.03  # in each round
_READ_BUFFER_BYTES = {"cpu": 256 * 2**20, "cuda": 2 * 2**30}


@dataclass(frozen=True, kw_only=True)
class RoundTimes:
    """The best of all rounds. seconds: of each kernel; the limits: the machine's, measured between them.

    ops_per_s: of what the kernels multiply; an operation is a multiply or an add.
    """

    seconds: tuple[float, ...]
    read_bytes_per_s: float
    ops_per_s: float


@dataclass(frozen=True, kw_only=True)
class KernelFigure:
    """num_bytes, num_ops: what the kernel must read and do; read_bytes_per_s, ops_per_s: the machine's, measured beside
    it."""

    num_bytes: int
    num_ops: int
    seconds: float
    read_bytes_per_s: float
    ops_per_s: float

    @property
    def floor_s(self) -> float:
        return max(self.num_bytes / self.read_bytes_per_s, self.num_ops / self.ops_per_s)

    @property
    def share(self) -> float:
        """How much of the limit was reached: 1 is all of it."""
        return self.floor_s / self.seconds

    def to_json(self) -> dict[str, object]:
        fields = asdict(self) | {"floor_s": self.floor_s, "share": self.share}
        return {name: value.value if isinstance(value, Enum) else value for name, value in fields.items()}


def num_copies(num_bytes: int) -> int:
    """How many of so many bytes exceed the machine's caches together."""
    return -(-_WORKING_SET_BYTES // num_bytes)


def time_rounds(
    kernels: Kernels, runs: Sequence[Callable[[int], object]], num_copies: int, multiplies: WeightFormat
) -> RoundTimes:
    """Some kernels, each on its copies of what it reads, and the machine's limits: all in turn, and then again.

    runs: called with the number of a copy. multiplies: the format whose peak bounds all of them.
    """
    timed = [_timed(kernels, run, num_copies) for run in runs]
    seconds = [float("inf")] * len(runs)
    read_bytes_per_s = ops_per_s = 0.0
    for _ in range(_NUM_ROUNDS):
        read_bytes_per_s = max(
            read_bytes_per_s, kernels.machine.read_bytes_per_s(_READ_BUFFER_BYTES[kernels.device.type])
        )
        for i, calls in enumerate(timed):
            seconds[i] = min(seconds[i], calls.best_s(min_calls=_MIN_CALLS, min_s=_MIN_S))
        ops_per_s = max(ops_per_s, kernels.machine.multiply_ops_per_s(multiplies)[1])
    return RoundTimes(seconds=tuple(seconds), read_bytes_per_s=read_bytes_per_s, ops_per_s=ops_per_s)


def _timed(kernels: Kernels, run: Callable[[int], object], num_copies: int) -> TimedCalls:
    """On a GPU all copies become one graph, which a recording of each would not make faster."""
    call = run if kernels.device.type == "cuda" else _Recorded(kernels, run, num_copies)
    return time_calls([partial(call, i) for i in range(num_copies)], kernels.device)


class _Recorded:
    """A kernel on each copy of what it reads, as a decode step replays it: asking for a small one from Python may take
    longer than it runs."""

    def __init__(self, kernels: Kernels, run: Callable[[int], object], num_copies: int) -> None:
        self._run = run  # a recording holds pointers to what is kept here
        self._replays = [kernels.record(partial(run, i))[1].replay for i in range(num_copies)]

    def __call__(self, i: int) -> None:
        replay = self._replays[i]
        if replay is None:
            self._run(i)
        else:
            replay()
