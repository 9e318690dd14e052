"""Ranks of one host that exchange tensors through shared memory.

One rank makes a `SharedRegion`, the others inherit its descriptor and attach to it:

    region = make_region(world_size, ring_bytes, ())           # rank 0
    subprocess.Popen(..., pass_fds=[region.fd])
    region = join_region(fd)                                   # every other rank; the region closes fd
"""

from collections.abc import Sequence

from headrace.errors import ConfigError
from headrace.parallel.native import _native


def make_region(
    world_size: int, ring_bytes: int, pair_ring_bytes: Sequence[tuple[int, int, int]]
) -> _native.SharedRegion:
    """Memory with a ring of ring_bytes from each rank to each other; (from, to, bytes) for pairs that need another.

    Raises:
        ConfigError: too little memory.
    """
    try:
        return _native.SharedRegion(world_size, ring_bytes, pair_ring_bytes)
    except OSError as error:
        raise ConfigError(f"no memory for the ranks to share: {error}") from None


def join_region(fd: int) -> _native.SharedRegion:
    """The region that rank 0 has made."""
    return _native.SharedRegion.attach(fd)


def make_communicator(region: _native.SharedRegion, rank: int) -> _native.Communicator:
    """Rank `rank`'s end of a region; each rank has one, for as long as the region lives.

    Raises:
        ValueError: the region has no such rank.
    """
    return _native.Communicator.over_shared_memory(region, rank)
