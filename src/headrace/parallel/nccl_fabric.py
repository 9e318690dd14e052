"""Groups over NCCL for the ranks of one engine, each with a GPU of its own, and the watch over their exchanges."""

import os
import threading
import time
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import Store

from headrace.errors import BackendUnavailable, ParallelismError, RankError
from headrace.kernels import Kernels
from headrace.parallel.exchange_events import Event, ExchangeEvents
from headrace.parallel.group import Group, OneRankGroup
from headrace.parallel.nccl_errors import explain_nccl
from headrace.parallel.nccl_group import NcclGroup
from headrace.parallel.torch_fabric import group_store

_ENVIRONMENT = {
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "0",
    "TORCH_NCCL_ENABLE_MONITORING": "0",
    "TORCH_NCCL_RETHROW_CUDA_ERRORS": "0",
    "TORCH_NCCL_DUMP_ON_TIMEOUT": "0",
    # Messages between stages are ordered with the sums of a stage in any case: all are work on one stream.
    "TORCH_NCCL_SHOW_EAGER_INIT_P2P_SERIALIZATION_WARNING": "0",
    # Rings, trees and NVLink SHARP are connected when a group is made, with all buffers they will ever have, and not at
    # the first exchange of a size that NCCL finds one of them best for (NCCL's user guide, since 2.22).
    "NCCL_RUNTIME_CONNECT": "0",
}
"""torch's own watch over NCCL ends the process where an exchange fails or stalls, and never sees those of a CUDA graph.
Here the engine is ended instead, by `World` and by `NcclFabric`, with an error that says why."""

_OPERATIONS = {"tp": ("all_reduce", "all_gather"), "kv": ("all_gather", "reduce_scatter"), "pp": ("send",)}
"""Of each group, what ranks are connected for."""

_HERE = "here-"
_POLL_S = 0.01

_CHECKS_PER_TIMEOUT = 20
_MAX_INTERVAL_S = 1.0
_CLOSE_S = 2.0


class NcclFabric:
    """Groups of torch.distributed over NCCL, beside whatever process group the program itself has.

    store: one that all ranks share. timeout_s: an exchange that is not over so long after it was asked for is ended,
    and all others with it.
    """

    def __init__(self, store: Store, rank: int, timeout_s: float) -> None:
        if not dist.is_nccl_available():
            raise BackendUnavailable(f"transport is 'nccl', which torch {torch.__version__} was built without")
        self._store, self._rank, self._timeout_s = store, rank, timeout_s
        self._groups: list[NcclGroup] = []
        self._failure: str | None = None
        self._lock = threading.Lock()
        self._is_over = threading.Event()
        self._watch: threading.Thread | None = None

    def make_group(self, name: str, ranks: Sequence[int], kernels: Kernels) -> Group:
        """
        Raises:
            ParallelismError: the model does not lie on a GPU.
            RankError: a rank is missing.
        """
        if kernels.device.type != "cuda":
            raise ParallelismError(
                f"transport is 'nccl', which joins GPUs, but the model lies on {kernels.device}; use shm, mpi or gloo"
            )
        return OneRankGroup(name) if len(ranks) == 1 else self._connect(name, ranks, kernels.device)

    def abort(self, reason: str) -> None:
        with self._lock:
            if self._failure is not None:
                return
            self._failure = f"exchanges have been ended: {reason}"
        self._is_over.set()
        self._abort_groups()

    def check(self) -> None:
        """
        Raises:
            RankError: exchanges have been ended, so that nothing computed since is valid.
        """
        if self._failure is not None:
            raise RankError(self._failure)

    def close(self) -> None:
        self._is_over.set()
        end_s = time.monotonic() + _CLOSE_S
        for thread in self._abort_groups():
            thread.join(max(0.0, end_s - time.monotonic()))

    def _connect(self, name: str, ranks: Sequence[int], device: torch.device) -> NcclGroup:
        store, rank = group_store(self._store, name, ranks), list(ranks).index(self._rank)
        self._await_ranks(store, rank, len(ranks))
        process_group = self._make_process_group(store, rank, len(ranks), device)
        group = NcclGroup(name, process_group, ExchangeEvents(self._make_event), lambda: self._failure)
        self._groups.append(group)
        if self._watch is None:
            self._watch = threading.Thread(target=self._run, args=[device], name="headrace-nccl", daemon=True)
            self._watch.start()
        group.connect(_OPERATIONS[name], device)
        return group

    def _await_ranks(self, store: Store, rank: int, size: int) -> None:
        """Until all ranks of a group are here, or one of the engine's is lost: NCCL would wait without end."""
        store.set(f"{_HERE}{rank}", "1")
        while not store.check([f"{_HERE}{other}" for other in range(size)]):
            self.check()
            time.sleep(_POLL_S)

    def _make_process_group(self, store: Store, rank: int, size: int, device: torch.device) -> dist.ProcessGroup:
        # Not in a build of torch without CUDA.
        from torch._C._distributed_c10d import ProcessGroupNCCL

        options = ProcessGroupNCCL.Options()
        options._timeout = timedelta(seconds=self._timeout_s)
        # NCCL reads its own when the first communicator is made, torch when the group is.
        with defaults_in(os.environ, _ENVIRONMENT):
            process_group = ProcessGroupNCCL(store, rank, size, options)
            try:
                process_group.eager_connect_single_device(device)
            except RuntimeError as error:
                raise RankError(f"rank {self._rank} finds no others over NCCL: {explain_nccl(error)}") from None
        return process_group  # type: ignore[return-value]

    def _make_event(self) -> Event:
        return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]

    def _abort_groups(self) -> list[threading.Thread]:
        """Each on a thread of its own: aborting one may wait for kernels of another, and for graphs that hold some of
        its exchanges to be destroyed."""
        groups, self._groups = self._groups, []
        threads = [threading.Thread(target=_abort, args=[group], daemon=True) for group in groups]
        for thread in threads:
            thread.start()
        return threads

    def _run(self, device: torch.device) -> None:
        if device.type == "cuda":
            # A thread begins on the first GPU, where asking about an event would take room.
            torch.cuda.set_device(device)
        interval_s = min(_MAX_INTERVAL_S, self._timeout_s / _CHECKS_PER_TIMEOUT)
        while not self._is_over.wait(interval_s):
            for group in tuple(self._groups):
                if group.events.oldest_s() > self._timeout_s:
                    self.abort(f"one of group {group.name} was not over after {self._timeout_s:g} s")
                    return


@contextmanager
def defaults_in(environ: MutableMapping[str, str], defaults: Mapping[str, str]) -> Iterator[None]:
    """Within it variables that are not set have these values: torch reads some when a group is made, and the program
    may have groups of its own."""
    added = {name: value for name, value in defaults.items() if name not in environ}
    environ.update(added)
    try:
        yield
    finally:
        for name in added:
            environ.pop(name, None)


def _abort(group: NcclGroup) -> None:
    with suppress(RuntimeError):
        group.abort()
