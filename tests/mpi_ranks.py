"""Run by mpiexec, see test_communicator_mpi.py: `mpiexec -n 2 python tests/mpi_ranks.py NAME ...` runs each function on
each rank."""

import sys
import threading
import time
import traceback

import torch
from rank_cases import CASES, assert_same_bits, brought, world_group

from headrace.errors import RankError
from headrace.parallel.mpi import make_communicator


def sends_leave_while_their_rank_is_elsewhere(communicator):
    """Rank 0 sends more than any library buffers and is then outside of MPI until the last rank has it all."""
    from mpi4py import MPI

    group = world_group(communicator)
    messages = [brought(0, [500_000], torch.float32, seed) for seed in range(8)]
    last = group.world_size - 1
    if group.rank == 0:
        started_s = time.monotonic()
        for message in messages:
            sent = message.clone()
            group.send(sent, last, "boundary")
            sent.fill_(torch.nan)
        assert time.monotonic() - started_s < 2.0, "a send has waited for its receiver"
        time.sleep(4.0)
    elif group.rank == last:
        time.sleep(2.0)
        received = torch.empty(500_000)
        started_s = time.monotonic()
        for message in messages:
            group.recv_(received, 0, "boundary")
            assert_same_bits(received, message)
        assert time.monotonic() - started_s < 1.5, "messages have waited for their sender"
    MPI.COMM_WORLD.Barrier()


def sizes_must_agree(communicator):
    group = world_group(communicator)
    if group.rank == 0:
        group.send(torch.zeros(5), 1, "boundary")
    if group.rank == 1:
        try:
            group.recv_(torch.zeros(6), 0, "boundary")
        except RankError as error:
            assert "rank 0 sent 20 bytes where rank 1 expected 24" in str(error)
        else:
            raise AssertionError("a message of another size was taken")
        group.recv_(torch.zeros(5), 0, "boundary")


def abort_ends_a_wait(communicator):
    """Rank 0 waits for a rank that never comes to the exchange. Last, because nothing can follow it."""
    if communicator.rank > 0:
        time.sleep(1.5)
        return
    group = world_group(communicator)
    threading.Timer(0.5, lambda: communicator.abort("rank 1 has stalled")).start()
    started_s = time.monotonic()
    for _ in range(2):
        try:
            group.recv_(torch.zeros(6), 1, "boundary")
        except RankError as error:
            assert str(error) == "rank 1 has stalled"
        else:
            raise AssertionError("a wait ended without a message")
    assert time.monotonic() - started_s < 1.5


def main() -> None:
    torch.set_num_threads(1)
    communicator = make_communicator()
    own = {f.__name__: f for f in (sends_leave_while_their_rank_is_elsewhere, sizes_must_agree, abort_ends_a_wait)}
    cases = CASES | own
    for name in sys.argv[1:]:
        try:
            cases[name](communicator)
        except BaseException:
            from mpi4py import MPI

            print(f"{name} on rank {communicator.rank}:\n{traceback.format_exc()}", file=sys.stderr, flush=True)
            MPI.COMM_WORLD.Abort(1)
    print(f"rank {communicator.rank} of {communicator.world_size} is done", flush=True)


if __name__ == "__main__":
    main()
