"""Groups of torch.distributed for the ranks of one engine."""

from collections.abc import Sequence
from datetime import timedelta

import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, ProcessGroupGloo, Store

from headrace.kernels import Kernels
from headrace.parallel.group import Group, OneRankGroup
from headrace.parallel.torch_group import TorchGroup


class TorchFabric:
    """Groups of torch.distributed, beside whatever process group the program itself has.

    backend: "gloo" or "nccl". store: one that all ranks share. timeout_s: of any exchange.
    """

    def __init__(self, backend: str, store: Store, rank: int, timeout_s: float) -> None:
        self._backend, self._store, self._rank = backend, store, rank
        self._timeout = timedelta(seconds=timeout_s)

    def make_group(self, name: str, ranks: Sequence[int], kernels: Kernels) -> Group:  # noqa: ARG002
        if len(ranks) == 1:
            return OneRankGroup(name)
        store = PrefixStore(f"{name}-{'-'.join(map(str, ranks))}", self._store)
        rank, size = list(ranks).index(self._rank), len(ranks)
        return TorchGroup(name, self._make_process_group(store, rank, size))

    def _make_process_group(self, store: Store, rank: int, size: int) -> dist.ProcessGroup:
        if self._backend == "gloo":
            return ProcessGroupGloo(store, rank, size, self._timeout)  # type: ignore[return-value]
        # Not in a build of torch without CUDA.
        from torch._C._distributed_c10d import ProcessGroupNCCL

        options = ProcessGroupNCCL.Options()
        options._timeout = self._timeout
        return ProcessGroupNCCL(store, rank, size, options)  # type: ignore[return-value]

    def abort(self, reason: str) -> None:
        """Nothing to do: a peer's death breaks gloo's connections, and `timeout_s` ends the rest."""

    def close(self) -> None:
        pass
