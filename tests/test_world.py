"""Ranks of a world, each with its pulse, joined by sockets within one process."""

import itertools
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from headrace.config import ParallelConfig
from headrace.parallel.channel import Channel
from headrace.parallel.fabric import NoFabric
from headrace.parallel.place import Place
from headrace.parallel.world import World


def make_worlds(world_size, *, config=None, **of_rank_0):
    """Rank 0's with a control channel and a line to each other rank, then theirs."""
    config = config or ParallelConfig(tensor_parallel_size=world_size, deadline_s=1)
    control, lines, others = {}, {}, []
    for rank in range(1, world_size):
        pairs = [[Channel(end) for end in socket.socketpair()] for _ in range(2)]
        (control[rank], their_control), (lines[rank], their_line) = pairs
        place = Place(rank=rank, config=config)
        host = {"num_ranks_on_host": world_size, "local_rank": rank}
        others.append(World(place, NoFabric(), {0: their_control}, {0: their_line}, **host))
    host = {"num_ranks_on_host": world_size, "local_rank": 0}
    first = World(Place(rank=0, config=config), NoFabric(), control, lines, **host, **of_rank_0)
    return [first, *others]


def end_with(world, heard):
    heard.append(world.receive(0))
    world.close()


def test_ranks_that_end_at_the_last_message_are_not_lost():
    """One that ended before rank 0 had stopped listening was taken for lost, and the others were told so."""
    said = []
    first, *others = make_worlds(3, on_failure=said.append, on_close=lambda: time.sleep(0.3))
    heard = []
    threads = [threading.Thread(target=end_with, args=(world, heard)) for world in others]
    for thread in threads:
        thread.start()
    first.close(b"end")
    for thread in threads:
        thread.join()
    assert heard == [b"end", b"end"]
    assert [world.failure for world in (first, *others)] == [None, None, None]
    assert said == []


def test_who_hangs_up_without_a_word_is_lost():
    first, second, third = make_worlds(3)
    second._lines[0]._stream.shutdown(socket.SHUT_RDWR)
    deadline_s = time.monotonic() + 5
    while not (first.failure and third.failure):
        assert time.monotonic() < deadline_s
        time.sleep(0.01)
    assert first.failure == third.failure == "rank 1 has gone"
    for world in (first, second, third):
        world.close()


@pytest.mark.parametrize("votes", list(itertools.product([True, False], repeat=3)))
def test_all_ranks_agree_or_none(votes):
    worlds = make_worlds(3)
    with ThreadPoolExecutor(3) as pool:
        for _ in range(2):
            assert list(pool.map(World.all_agree, worlds, votes)) == [all(votes)] * 3
    for world in worlds:
        world.close()
