"""Ranks of one host over shared memory, as processes: collectives, their ledger, recordings, faults."""

import mmap
import os
import resource
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch

pytest.importorskip("headrace._native", reason="the native module is not built", exc_type=ImportError)

from rank_cases import CASES, assert_same_bits, brought, rank_order_sum, world_group
from ranks import RING_BYTES, run_ranks, start_ranks

from headrace.costs.sites import Phase
from headrace.errors import KernelError, RankError, ShapeError
from headrace.kernels import KernelChoice, resolve_kernels
from headrace.parallel.native_group import NativeGroup, _native
from headrace.parallel.shm import make_communicator

each_world_size = pytest.mark.parametrize("world_size", [2, 3, 4])


@each_world_size
@pytest.mark.parametrize("name", CASES)
def test_ranks(name, world_size):
    run_ranks(world_size, CASES[name])


def test_rank_order_matters_to_what_these_tests_bring():
    """Else a sum in another order would pass them."""
    parts = [brought(rank, [1000], torch.float32) for rank in range(3)]
    assert not torch.equal(rank_order_sum(parts, torch.float32), rank_order_sum(parts[::-1], torch.float32))


# Sends that do not wait


def test_a_send_does_not_wait_for_a_receiver_while_its_ring_has_room():
    """One rank sends before anybody receives: a ring of its own size holds what the others' could not."""
    num_messages, size = 8, 25_000
    region = _native.SharedRegion(2, 1024, [(0, 1, num_messages * (4 * size + 128))])
    sender, receiver = (world_group(make_communicator(region, rank)) for rank in range(2))
    messages = [brought(0, [size], torch.float32, seed) for seed in range(num_messages)]
    for message in messages:
        sender.send(message.clone(), 1, "boundary")
    for message in messages:
        received = torch.empty(size)
        receiver.recv_(received, 0, "boundary")
        assert_same_bits(received, message)


def test_header_bytes_are_counted_apart():
    region = _native.SharedRegion(2, RING_BYTES)
    communicator = make_communicator(region, 0)
    group = NativeGroup(communicator, "tp", [0, 1])
    for _ in range(3):
        group.send(torch.zeros(5), 1, "boundary")
    assert communicator.header_bytes == 3 * 16
    assert [row.wire_bytes for row in group.ledger_rows()] == [60]


def test_wait_is_what_passes_until_the_last_rank_has_come():
    """Rank 1 comes late: rank 0 waits for it, and rank 1 for nobody. In the same process the order is certain."""
    region = _native.SharedRegion(2, RING_BYTES)
    groups = [world_group(make_communicator(region, rank)) for rank in range(2)]
    late_by_s = 0.2
    early = threading.Thread(target=lambda: groups[0].all_reduce(torch.ones(100), "here"))
    early.start()
    time.sleep(late_by_s)
    groups[1].all_reduce(torch.ones(100), "here")
    early.join()
    (waited,), (came_late,) = (group.ledger_rows() for group in groups)
    assert waited.wait_s >= late_by_s / 2
    assert came_late.wait_s == 0
    assert came_late.transfer_s > 0


# Recordings


def replays_what_was_recorded(communicator):
    """A step of native ops with collectives among them, recorded once and launched again with other inputs."""
    kernels = resolve_kernels(KernelChoice.CPU)
    group = world_group(communicator, kernels.stream)
    hop = world_group(communicator, kernels.stream)
    world_size, rank = group.world_size, group.rank
    x, received, rows = torch.empty(3, 64), torch.zeros(3, 64), torch.empty(world_size, 2, 32)
    ones, ids = torch.ones(64), torch.empty(world_size, 5, dtype=torch.int64)

    def step():
        normed = kernels.rms_norm(x, ones, eps=1e-6)
        total = group.all_reduce(normed, "sum", out_dtype=torch.bfloat16)
        parts = group.all_gather(kernels.rms_norm(x, ones, eps=1e-5), "gather")
        scattered = group.reduce_scatter(rows, "scatter")
        if rank > 0:
            hop.recv_(received, rank - 1, "hop")
        if rank + 1 < world_size:
            hop.send(kernels.rms_norm(x, ones, eps=1e-3), rank + 1, "hop")
        return total, parts, scattered, group.all_gather(ids, "ids")

    def bring(seed):
        x.copy_(brought(rank, [3, 64], torch.float32, seed))
        rows.copy_(brought(rank, [world_size, 2, 32], torch.float32, seed))
        ids.copy_(torch.arange(5 * world_size).view(world_size, 5) * (rank + seed + 1))

    def check(out, seed):
        normed = [
            {
                eps: kernels.rms_norm(brought(peer, [3, 64], torch.float32, seed), ones, eps=eps)
                for eps in (1e-6, 1e-5, 1e-3)
            }
            for peer in range(world_size)
        ]
        total, parts, scattered, gathered_ids = out
        assert_same_bits(total, rank_order_sum([n[1e-6] for n in normed], torch.bfloat16))
        for part, n in zip(parts, normed, strict=True):
            assert_same_bits(part, n[1e-5])
        all_rows = [brought(peer, [world_size, 2, 32], torch.float32, seed) for peer in range(world_size)]
        assert_same_bits(scattered, rank_order_sum(all_rows, torch.float32)[rank])
        for peer, part in enumerate(gathered_ids):
            assert_same_bits(part, torch.arange(5 * world_size).view(world_size, 5) * (peer + seed + 1))
        if rank > 0:
            assert_same_bits(received, normed[rank - 1][1e-3])

    bring(0)
    out, recording = kernels.record(step)
    assert recording.replay is not None, recording.obstacle
    check(out, 0)
    group.set_phase(Phase.DECODE)
    for seed in range(1, 30):
        bring(seed)
        received.fill_(torch.nan)
        recording.replay()
        check(out, seed)
    counts = {(row.site, row.phase): row.count for row in group.ledger_rows()}
    sites = ("sum", "gather", "scatter", "ids")
    assert counts == {(site, Phase.PREFILL): 1 for site in sites} | {(site, Phase.DECODE): 29 for site in sites}


@each_world_size
def test_recorded_collectives_are_replayed_with_the_step(world_size):
    run_ranks(world_size, replays_what_was_recorded)


# Faults


@pytest.mark.parametrize("number", [signal.SIGSTOP, signal.SIGKILL], ids=lambda s: s.name)
@pytest.mark.parametrize("when", ["at once", "while it sleeps"])
def test_abort_wakes_a_rank_whose_peer_is_gone(number, when):

    def rank(communicator):
        group = world_group(communicator)
        group.all_reduce(torch.ones(10), "here")
        if group.rank == 1:
            # The others never meet this rank again.
            os.kill(os.getpid(), number)
            time.sleep(60)
        if when == "at once":
            communicator.abort("rank 1 has gone")
        else:
            threading.Timer(0.5, lambda: communicator.abort("rank 1 has gone")).start()
        started_s = time.monotonic()
        for _ in range(2):
            with pytest.raises(RankError, match=r"^rank 1 has gone$"):
                group.all_reduce(torch.ones(100_000), "here")
        return time.monotonic() - started_s

    ranks = start_ranks(3, rank)
    try:
        for survivor in (ranks[0], ranks[2]):
            assert survivor.result() < 1.5
    finally:
        for process in ranks:
            process.end()


def test_aborted_waits_of_every_kind_end():
    for begin in (
        lambda group: group.all_reduce(torch.ones(1), "here"),
        lambda group: group.all_gather(torch.ones(1), "here"),
        lambda group: group.reduce_scatter(torch.ones(2, 1), "here"),
        lambda group: group.recv_(torch.ones(1), 1, "here"),
        lambda group: group.send(torch.ones(1000), 1, "here"),
    ):
        communicator = make_communicator(_native.SharedRegion(2, 1024), 0)
        group = world_group(communicator)
        threading.Timer(0.05, lambda communicator=communicator: communicator.abort("enough")).start()
        with pytest.raises(RankError, match=r"^enough$"):
            begin(group)


def test_ranks_that_disagree_about_a_message_are_told():
    region = _native.SharedRegion(2, RING_BYTES)
    groups = [world_group(make_communicator(region, rank)) for rank in range(2)]
    groups[0].send(torch.zeros(5), 1, "boundary")
    with pytest.raises(
        RankError, match=r"rank 0 sent 20 bytes where rank 1 expected 24: .* no longer make the same calls"
    ):
        groups[1].recv_(torch.zeros(6), 0, "boundary")


# The region


def test_region_is_inherited_by_descriptor():
    """A started program attaches to the region and exchanges with this one, and nothing has a name."""
    region = _native.SharedRegion(2, RING_BYTES)
    program = (
        "import sys, torch\n"
        "from headrace.parallel.native_group import NativeGroup, _native\n"
        "from headrace.parallel.shm import make_communicator\n"
        "communicator = make_communicator(_native.SharedRegion.attach(int(sys.argv[1])), 1)\n"
        "total = NativeGroup(communicator, 'tp', [0, 1]).all_reduce(torch.arange(9.0), 'here')\n"
        "assert torch.equal(total, 2 * torch.arange(9.0) + 1)\n"
    )
    child = subprocess.Popen([sys.executable, "-c", program, str(region.fd)], pass_fds=[region.fd])
    group = world_group(make_communicator(region, 0))
    total = group.all_reduce(torch.arange(9.0) + 1, "here")
    assert child.wait() == 0
    assert torch.equal(total, 2 * torch.arange(9.0) + 1)


def test_region_says_what_it_cannot_be():
    with pytest.raises(ValueError, match="world_size is 0"):
        _native.SharedRegion(0, 1024)
    with pytest.raises(ValueError, match="a ring from rank 0 to rank 2 in a world of 2"):
        _native.SharedRegion(2, 1024, [(0, 2, 1024)])
    with pytest.raises(ValueError, match="rank 2 in a world of 2"):
        make_communicator(_native.SharedRegion(2, 1024), 2)
    fd = os.memfd_create("other")
    try:
        with pytest.raises(ValueError, match="not the shared memory of ranks"):
            _native.SharedRegion.attach(fd)
        os.truncate(fd, mmap.PAGESIZE)
        with pytest.raises(ValueError, match="not the shared memory of ranks"):
            _native.SharedRegion.attach(fd)
    finally:
        os.close(fd)


def test_too_little_memory_for_a_region_is_an_error_at_once():
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
    previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        with pytest.raises(OSError, match="bytes of shared memory between ranks"):
            _native.SharedRegion(4, 1 << 20)
    finally:
        signal.signal(signal.SIGXFSZ, previous)
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


# What a group refuses


def test_group_refuses_what_it_cannot_do():
    communicator = make_communicator(_native.SharedRegion(3, 1024, [(0, 2, 0)]), 0)
    group = NativeGroup(communicator, "tp", [0, 1, 2])
    for ranks in ([1, 2], [0, 0], [0, 3], [0, -1]):
        with pytest.raises(ValueError, match="different ranks of the world, this one among them"):
            NativeGroup(communicator, "tp", ranks)
    with pytest.raises(KernelError, match=r"float32 and bfloat16, not of torch\.int64"):
        group.all_reduce(torch.arange(3), "here")
    with pytest.raises(ShapeError, match="all_reduce takes contiguous tensors"):
        group.all_reduce(torch.ones(4, 3).T, "here")
    with pytest.raises(ShapeError, match=r"is not what the sizes \[1, 2\] say"):
        group.all_gather(torch.ones(1), "here", [1, 2])
    with pytest.raises(ShapeError, match="one row for each of 3 ranks"):
        group.reduce_scatter(torch.ones(2, 5), "here")
    for peer in (0, 3, -1):
        with pytest.raises(ValueError, match=f"no peer {peer}"):
            group.send(torch.ones(1), peer, "here")
        with pytest.raises(ValueError, match=f"no peer {peer}"):
            group.recv_(torch.ones(1), peer, "here")
    with pytest.raises(ValueError, match="no ring from rank 0 to rank 2"):
        group.send(torch.ones(1), 2, "here")


def test_group_of_one_exchanges_nothing():
    group = NativeGroup(make_communicator(_native.SharedRegion(2, 1024), 1), "tp", [1])
    x = torch.randn(4, 7)
    assert_same_bits(group.all_reduce(x.clone(), "here"), x)
    assert_same_bits(group.all_reduce(x, "here", out_dtype=torch.bfloat16), x.bfloat16())
    assert_same_bits(group.all_gather(x, "here")[0], x)
    assert_same_bits(group.reduce_scatter(x[None], "here"), x)
    assert sum(row.wire_bytes for row in group.ledger_rows()) == 0


def test_without_the_native_module_the_reason_is_given():
    program = (
        "import sys; sys.modules['headrace._native'] = None\n"
        "from headrace.errors import BackendUnavailable\n"
        "try:\n    import headrace.parallel.native_group\n"
        "except BackendUnavailable as error: print(error)\n"
    )
    out = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout
    assert out.startswith("ranks on CPUs exchange tensors through the native module, but ")
