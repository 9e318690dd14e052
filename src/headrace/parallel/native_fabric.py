"""Groups over native communicators: shared memory within a host, MPI within and between hosts."""

from collections.abc import Callable, Sequence

from headrace.kernels import Kernels
from headrace.parallel.group import Group, OneRankGroup
from headrace.parallel.native import _native
from headrace.parallel.native_group import NativeGroup


class NativeFabric:
    """communicator: this rank's end of the world. on_close: gives back what the communicator stands on."""

    def __init__(self, communicator: _native.Communicator, on_close: Callable[[], None] = lambda: None) -> None:
        self._communicator = communicator
        self._on_close = on_close

    def make_group(self, name: str, ranks: Sequence[int], kernels: Kernels) -> Group:
        if len(ranks) == 1:
            return OneRankGroup(name)
        return NativeGroup(self._communicator, name, ranks, kernels.stream)

    def abort(self, reason: str) -> None:
        self._communicator.abort(reason)

    def close(self) -> None:
        self._on_close()
