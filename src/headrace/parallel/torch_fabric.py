"""Groups over gloo for the ranks of one engine."""

from collections.abc import Sequence
from datetime import timedelta

from torch._C._distributed_c10d import PrefixStore, ProcessGroupGloo, Store

from headrace.kernels import Kernels
from headrace.parallel.group import Group, OneRankGroup
from headrace.parallel.torch_group import TorchGroup


class TorchFabric:
    """Groups of torch.distributed, beside whatever process group the program itself has.

    store: one that all ranks share. timeout_s: of any exchange.
    """

    def __init__(self, store: Store, rank: int, timeout_s: float) -> None:
        self._store, self._rank = store, rank
        self._timeout = timedelta(seconds=timeout_s)

    def make_group(self, name: str, ranks: Sequence[int], kernels: Kernels) -> Group:  # noqa: ARG002
        if len(ranks) == 1:
            return OneRankGroup(name)
        store = group_store(self._store, name, ranks)
        process_group = ProcessGroupGloo(store, list(ranks).index(self._rank), len(ranks), self._timeout)
        return TorchGroup(name, process_group)  # type: ignore[arg-type]

    def abort(self, reason: str) -> None:
        """Nothing to do: a peer's death breaks gloo's connections, and `timeout_s` ends the rest."""

    def check(self) -> None:
        """Nothing to say: an exchange that failed has raised."""

    def close(self) -> None:
        pass


def group_store(store: Store, name: str, ranks: Sequence[int]) -> Store:
    """Where the ranks of one group find each other."""
    return PrefixStore(f"{name}-{'-'.join(map(str, ranks))}", store)
