"""The world of ranks that a launcher has started, on one host or several."""

import logging
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import NamedTuple

from headrace.config import ParallelConfig, Transport
from headrace.config.launched import Launched
from headrace.errors import ParallelismError
from headrace.machine import host_id
from headrace.parallel.fabric import Fabric
from headrace.parallel.meeting import Broadcast, open_lines
from headrace.parallel.mpich_memory import unname_mpich_memory
from headrace.parallel.place import Place
from headrace.parallel.store_fabric import store_fabric
from headrace.parallel.world import World, exit_soon

logger = logging.getLogger(__name__)

_has_joined = threading.Event()
"""A launcher starts ranks once in a process, and MPI itself starts once: a fact of the process, not of an engine."""


def join_launched_world(config: ParallelConfig, launched: Launched) -> World:
    """All ranks call this once.

    Raises:
        ParallelismError: another number of ranks than the layout has.
        BackendUnavailable: the transport's library is missing.
        RankError: ranks that do not find each other.
    """
    if launched.world_size != config.world_size:
        raise ParallelismError(
            f"{launched.launcher} has started {launched.world_size} ranks, but --tp {config.tensor_parallel_size} --pp "
            f"{config.pipeline_parallel_size} has {config.world_size}; make the two equal"
        )
    if _has_joined.is_set():
        raise ParallelismError(
            f"{launched.launcher} has started these ranks for one model, and the others have ended with it; "
            "start the program again for another"
        )
    _has_joined.set()
    with _ending_without_others(launched, config.deadline_s):
        start = _start_mpi(config) if config.transport is Transport.MPI else _start_torch(config, launched)
        control, line = open_lines(launched.rank, launched.world_size, start.broadcast, config.deadline_s)
        hosts = start.all_gather(host_id())
    start.has_met()
    place = Place(rank=launched.rank, config=config)
    return World(
        place,
        start.fabric,
        control,
        line,
        num_ranks_on_host=hosts.count(host_id()),
        local_rank=hosts[: launched.rank].count(host_id()),
        on_failure=_say_why if launched.rank == 0 else _end_soon,
    )


@contextmanager
def _ending_without_others(launched: Launched, deadline_s: float) -> Iterator[None]:
    """End this process, with a word on why, if the ranks do not meet in time: MPI's start cannot be called off."""

    def end() -> None:
        unname_mpich_memory()
        with suppress(OSError):
            print(
                f"headrace: rank {launched.rank} has not met all {launched.world_size} ranks of {launched.launcher} "
                f"within {deadline_s:g} s (--deadline); one of them has ended, is stopped, or runs another command",
                file=sys.stderr,
                flush=True,
            )
        os._exit(1)

    timer = threading.Timer(deadline_s, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _say_why(failure: str) -> None:
    """At once: the launcher may end this process before it comes to say so by itself."""
    logger.error(failure)


def _end_soon(failure: str) -> None:
    if failure.startswith("rank 0 "):
        _say_why(failure)  # which can no longer
    exit_soon(failure)


class _Start(NamedTuple):
    """What a launcher's library gives: a fabric, and enough to find each other.

    has_met: called once all have.
    """

    fabric: Fabric
    broadcast: Broadcast
    all_gather: Callable[[str], list[str]]
    has_met: Callable[[], None] = lambda: None


def _start_mpi(config: ParallelConfig) -> _Start:
    from headrace.parallel.mpi import import_mpi, make_communicator
    from headrace.parallel.native_fabric import NativeFabric

    communicator = make_communicator()
    world = import_mpi().COMM_WORLD
    fabric = NativeFabric(communicator, config.all_reduce_dtype)
    return _Start(fabric, world.bcast, world.allgather, unname_mpich_memory)


def _start_torch(config: ParallelConfig, launched: Launched) -> _Start:
    from torch.distributed.rendezvous import rendezvous

    store, rank, world_size = next(iter(rendezvous("env://", launched.rank, launched.world_size)))

    def broadcast(message: bytes) -> bytes:
        if rank == 0:
            store.set("lines", message)
        return bytes(store.get("lines"))

    def all_gather(text: str) -> list[str]:
        store.set(f"host-{rank}", text)
        return [store.get(f"host-{other}").decode() for other in range(world_size)]

    return _Start(store_fabric(config, store, rank), broadcast, all_gather)
