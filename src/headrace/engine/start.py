"""The world of an engine: none but itself, ranks of its own making, or those that it was started among."""

from headrace.config import EngineConfig, Transport
from headrace.parallel.local_world import start_local_world
from headrace.parallel.world import World, one_rank_world

_RANK_MODULE = "headrace.engine.rank_process"


def start_world(config: EngineConfig) -> World:
    """
    Raises:
        ParallelismError: ranks that `mpiexec` or `srun` has started and that do not fit the layout.
        OSError: no room for another process.
    """
    if config.parallel.world_size == 1:
        return one_rank_world()
    return start_local_world(config.parallel, Transport.GLOO, _RANK_MODULE, config)
