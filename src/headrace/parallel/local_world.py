"""The ranks of one host, started from rank 0: its world, and that of a rank that was started."""

import socket
from dataclasses import dataclass
from typing import Any

from headrace.config import ParallelConfig, Transport
from headrace.parallel.channel import Channel
from headrace.parallel.fabric import Fabric, NoFabric
from headrace.parallel.launch import Greeting, LocalRanks
from headrace.parallel.place import Place
from headrace.parallel.store_fabric import store_fabric
from headrace.parallel.world import World, exit_soon

_LOCALHOST = "127.0.0.1"

_RING_BYTES = 2**20
"""Of what one rank may be ahead of another within a stage. Longer messages travel in pieces."""


def start_local_world(config: ParallelConfig, module: str, settings: Any, *, micro_batch_bytes: int) -> World:
    """Start ranks 1 to world_size - 1 on this host; they load on their own from here on.

    module: run by each, with two descriptors as arguments; settings: what it finds in its `Greeting`.
    micro_batch_bytes: what one stage sends the next at most, so that it need not wait for that one to be read.

    Raises:
        OSError: no room for the processes.
        ConfigError: no room for the memory they share.
        BackendUnavailable: a transport that this build lacks.
    """
    meeting = _meet(config, micro_batch_bytes)
    ranks = LocalRanks(module)
    ranks.start(
        [
            Greeting(
                rank=rank,
                region_fd=meeting.region_fd,
                store_port=meeting.store_port,
                settings=settings,
            )
            for rank in range(1, config.world_size)
        ]
    )
    return World(
        Place(rank=0, config=config),
        meeting.fabric,
        ranks.control,
        ranks.lines,
        num_ranks_on_host=config.world_size,
        local_rank=0,
        describe=ranks.describe,
        on_failure=lambda _: ranks.end(),
        on_close=ranks.end,
    )


def join_local_world(greeting: Greeting, config: ParallelConfig, control: Channel, line: Channel) -> World:
    """The world of a rank that `start_local_world` has started, still without a fabric: see `join_fabric`."""
    return World(
        Place(rank=greeting.rank, config=config),
        NoFabric(),
        {0: control},
        {0: line},
        num_ranks_on_host=config.world_size,
        local_rank=greeting.rank,
        on_failure=exit_soon,
    )


@dataclass(frozen=True, kw_only=True)
class _Meeting:
    """Rank 0's fabric, and how others find it."""

    fabric: Fabric
    region_fd: int | None = None
    store_port: int | None = None


# Each transport is imported when it is chosen: a build may lack one, and importing all of them takes time.


def _meet(config: ParallelConfig, micro_batch_bytes: int) -> _Meeting:
    if config.transport is Transport.SHM:
        from headrace.parallel.native_fabric import NativeFabric
        from headrace.parallel.shm import make_communicator, make_region

        stage_size, num_stages = config.tensor_parallel_size, config.pipeline_parallel_size
        ahead_bytes = max(_RING_BYTES, num_stages * micro_batch_bytes)
        ahead = [(rank, rank + stage_size, ahead_bytes) for rank in range(config.world_size - stage_size)]
        region = make_region(config.world_size, _RING_BYTES, ahead)
        return _Meeting(fabric=NativeFabric(make_communicator(region, 0), config.all_reduce_dtype), region_fd=region.fd)
    from torch._C._distributed_c10d import TCPStore

    # A socket of our own, since torch's would listen on every interface.
    with socket.create_server((_LOCALHOST, 0)) as listener:
        port, descriptor = listener.getsockname()[1], listener.detach()
    store = TCPStore(_LOCALHOST, port, is_master=True, wait_for_workers=False, master_listen_fd=descriptor)
    return _Meeting(fabric=store_fabric(config, store, 0), store_port=store.port)


def join_fabric(greeting: Greeting, config: ParallelConfig) -> Fabric:
    """What carries this rank's tensors. Imports torch."""
    if greeting.region_fd is not None:
        from headrace.parallel.native_fabric import NativeFabric
        from headrace.parallel.shm import join_region, make_communicator

        return NativeFabric(make_communicator(join_region(greeting.region_fd), greeting.rank), config.all_reduce_dtype)
    from torch._C._distributed_c10d import TCPStore

    assert greeting.store_port is not None
    store = TCPStore(_LOCALHOST, greeting.store_port, is_master=False)
    return store_fabric(config, store, greeting.rank)
