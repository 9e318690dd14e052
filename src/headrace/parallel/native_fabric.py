"""Groups over native communicators: shared memory within a host, MPI within and between hosts."""

from collections.abc import Sequence

from headrace.config import AllReduceDtype
from headrace.kernels import Kernels
from headrace.parallel.group import Group, OneRankGroup
from headrace.parallel.native import _native
from headrace.parallel.native_group import NativeGroup


class NativeFabric:
    """communicator: this rank's end of the world. all_reduce_dtype: that sums travel in, see `NativeGroup`."""

    def __init__(self, communicator: _native.Communicator, all_reduce_dtype: AllReduceDtype) -> None:
        self._communicator = communicator
        self._all_reduce_dtype = all_reduce_dtype

    def make_group(self, name: str, ranks: Sequence[int], kernels: Kernels) -> Group:
        if len(ranks) == 1:
            return OneRankGroup(name)
        return NativeGroup(self._communicator, name, ranks, kernels.stream, all_reduce_dtype=self._all_reduce_dtype)

    def abort(self, reason: str) -> None:
        self._communicator.abort(reason)

    def check(self) -> None:
        """Nothing to say: an exchange that failed has raised."""

    def close(self) -> None:
        pass
