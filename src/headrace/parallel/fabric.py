"""What carries tensors between the ranks of one engine, and makes their groups."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from headrace.kernels import Kernels
    from headrace.parallel.group import Group


class Fabric(Protocol):
    """Made once per process; groups come from it, in the same order on every rank of each."""

    def make_group(self, name: str, ranks: Sequence[int], kernels: "Kernels") -> "Group":
        """The group of these ranks of the world, this one among them."""
        ...

    def abort(self, reason: str) -> None:
        """End every exchange that this process waits in or begins later, with an error. From any thread."""
        ...

    def check(self) -> None:
        """
        Raises:
            RankError: exchanges have ended without this process having been told in another way.
        """
        ...

    def close(self) -> None: ...


class NoFabric:
    """One rank, nobody else."""

    def make_group(self, name: str, ranks: Sequence[int], kernels: "Kernels") -> "Group":  # noqa: ARG002
        from headrace.parallel.group import OneRankGroup

        return OneRankGroup(name)

    def abort(self, reason: str) -> None:
        pass

    def check(self) -> None:
        pass

    def close(self) -> None:
        pass
