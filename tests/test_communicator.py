"""Ranks of one host over shared memory, as processes: collectives, their ledger, recordings, faults."""

import pytest

pytest.importorskip("headrace._native", reason="the native module is not built", exc_type=ImportError)

from rank_cases import CASES
from ranks import run_ranks

each_world_size = pytest.mark.parametrize("world_size", [2, 3, 4])


@each_world_size
@pytest.mark.parametrize("name", CASES)
def test_ranks(name, world_size):
    run_ranks(world_size, CASES[name])
