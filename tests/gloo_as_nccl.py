"""NCCL's fabric and groups without a GPU: the same calls on gloo, which torch offers through the same interface."""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore, ProcessGroupGloo, Store

from headrace.kernels import Kernels
from headrace.parallel.exchange_events import Event
from headrace.parallel.group import Group, OneRankGroup
from headrace.parallel.nccl_fabric import NcclFabric

CPU = torch.device("cpu")


class HostEvent:
    """A mark in the order of a stream that has done its work whenever it is asked."""

    def __init__(self) -> None:
        self.is_over = True
        self._ns = 0

    def record(self) -> None:
        self._ns = time.monotonic_ns()

    def query(self) -> bool:
        return self.is_over

    def synchronize(self) -> None:
        self.is_over = True

    def elapsed_time(self, end_event: "HostEvent") -> float:
        return (end_event._ns - self._ns) / 1e6


class GlooAsNccl(NcclFabric):
    """event: makes the marks."""

    def __init__(self, store: Store, rank: int, timeout_s: float, event: Callable[[], Event] = HostEvent) -> None:
        super().__init__(store, rank, timeout_s)
        self._event = event

    def make_group(self, name: str, ranks: Sequence[int], kernels: Kernels | None = None) -> Group:
        return OneRankGroup(name) if len(ranks) == 1 else self._connect(name, ranks, CPU)

    def _make_process_group(self, store: Store, rank: int, size: int, device: torch.device) -> dist.ProcessGroup:
        return ProcessGroupGloo(store, rank, size, timedelta(seconds=30))  # type: ignore[return-value]

    def _make_event(self) -> Event:
        return self._event()


@pytest.fixture
def make_fabrics(monkeypatch):
    """From a number of ranks, and what else a fabric takes, to a fabric for each."""
    monkeypatch.setattr(dist, "is_nccl_available", lambda: True)
    made = []

    def make(num_ranks: int, *, timeout_s: float = 30.0, **how: Any) -> list[GlooAsNccl]:
        store = HashStore()
        made.extend(fabrics := [GlooAsNccl(store, rank, timeout_s, **how) for rank in range(num_ranks)])
        return fabrics

    yield make
    for fabric in made:
        fabric.close()


def on_all(fabrics: Sequence[GlooAsNccl], run: Callable[[GlooAsNccl, int], Any]) -> list[Any]:
    """What each rank makes of its fabric, all at the same time."""
    with ThreadPoolExecutor(len(fabrics)) as pool:
        return list(pool.map(run, fabrics, range(len(fabrics))))
