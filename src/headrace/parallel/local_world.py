"""The ranks of one host, started from rank 0: its world, and that of a rank that was started."""

from typing import Any

from torch._C._distributed_c10d import TCPStore

from headrace.config import ParallelConfig, Transport
from headrace.parallel.channel import Channel
from headrace.parallel.fabric import Fabric
from headrace.parallel.launch import Greeting, LocalRanks
from headrace.parallel.place import Place
from headrace.parallel.torch_fabric import TorchFabric
from headrace.parallel.world import World

_LOCALHOST = "127.0.0.1"


def start_local_world(config: ParallelConfig, transport: Transport, module: str, settings: Any) -> World:
    """Start ranks 1 to world_size - 1 on this host; they load on their own from here on.

    module: run by each, with two descriptors as arguments; settings: what it finds in its `Greeting`.

    Raises:
        OSError: no room for the processes or the memory they share.
    """
    place = Place(rank=0, config=config)
    store = TCPStore(_LOCALHOST, 0, is_master=True, wait_for_workers=False)
    fabric = TorchFabric(transport.value, store, 0, config.deadline_s)
    ranks = LocalRanks(module)
    ranks.start(
        [
            Greeting(rank=rank, backend=transport.value, region_fd=None, store_port=store.port, settings=settings)
            for rank in range(1, config.world_size)
        ]
    )
    return World(
        place,
        fabric,
        ranks.control,
        ranks.lines,
        num_ranks_on_host=config.world_size,
        describe=ranks.describe,
        on_failure=ranks.end,
        on_close=ranks.end,
    )


def join_local_world(greeting: Greeting, config: ParallelConfig, control: Channel, line: Channel) -> World:
    """The world of a rank that `start_local_world` has started."""
    return World(
        Place(rank=greeting.rank, config=config),
        _join_fabric(greeting, config),
        {0: control},
        {0: line},
        num_ranks_on_host=config.world_size,
    )


def _join_fabric(greeting: Greeting, config: ParallelConfig) -> Fabric:
    assert greeting.store_port is not None
    store = TCPStore(_LOCALHOST, greeting.store_port, is_master=False)
    return TorchFabric(greeting.backend, store, greeting.rank, config.deadline_s)
