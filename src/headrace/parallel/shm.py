"""Ranks of one host that exchange tensors through shared memory.

One rank makes a `SharedRegion`, the others inherit its descriptor and attach to it:

    region = _native.SharedRegion(world_size, ring_bytes)      # rank 0
    subprocess.Popen(..., pass_fds=[region.fd])
    region = _native.SharedRegion.attach(fd)                   # every other rank; the region closes fd
"""

from headrace.parallel.native import _native


def make_communicator(region: _native.SharedRegion, rank: int) -> _native.Communicator:
    """Rank `rank`'s end of a region; each rank has one, for as long as the region lives.

    Raises:
        ValueError: the region has no such rank.
    """
    return _native.Communicator.over_shared_memory(region, rank)
