"""Ranks as threads of one process: the `Group` that tests use where processes would prove no more."""

import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from headrace.costs.sites import Phase
from headrace.parallel.exchange_counts import Call, Calls, ExchangeCounts
from headrace.parallel.ledger import LedgerRow

TIMEOUT_S = 30


class ThreadGroup:
    """A rank among threads of one process: every collective is a meeting at a barrier.

    board: one place per rank for the tensor it brings; boxes: [source][to], what was sent and not yet received.
    """

    def __init__(
        self,
        rank: int,
        world_size: int,
        board: list,
        barrier: threading.Barrier,
        boxes: list[list[queue.Queue]],
        name: str = "tp",
    ) -> None:
        self.name, self.rank, self.world_size = name, rank, world_size
        self._board, self._barrier, self._boxes = board, barrier, boxes
        self._counts = ExchangeCounts(name)
        self._counts.phase = Phase.DECODE

    def all_reduce(self, tensor: Tensor, site: str, *, out_dtype: torch.dtype | None = None) -> Tensor:
        return self._sum("all_reduce", tensor, site).to(out_dtype or tensor.dtype)

    def all_gather(self, tensor: Tensor, site: str, sizes: Sequence[int] | None = None) -> list[Tensor]:
        brought = self._meet("all_gather", tensor, site)
        assert [part.shape[-1] for part in brought] == list(sizes or [tensor.shape[-1]] * self.world_size)
        return brought

    def reduce_scatter(self, tensor: Tensor, site: str) -> Tensor:
        return self._sum("reduce_scatter", tensor, site)[self.rank].to(tensor.dtype)

    def send(self, tensor: Tensor, to: int, site: str) -> None:
        self._count("send", site, tensor.nbytes, tensor.nbytes)
        self._boxes[self.rank][to].put((site, tensor.clone()))

    def recv_(self, tensor: Tensor, source: int, site: str) -> None:
        self._count("recv", site, tensor.nbytes, 0)
        sent_for, sent = self._boxes[source][self.rank].get(timeout=TIMEOUT_S)
        assert (sent_for, sent.numel(), sent.dtype) == (site, tensor.numel(), tensor.dtype)
        tensor.copy_(sent.view_as(tensor))

    def set_phase(self, phase: Phase) -> None:
        self._counts.phase = phase

    def captured(self) -> AbstractContextManager[Calls]:
        return self._counts.captured()

    def count(self, calls: Calls) -> None:
        self._counts.count(calls)

    def ledger_rows(self) -> list[LedgerRow]:
        return self._counts.rows()

    def abort(self) -> None:
        """Let the others fail now instead of waiting for a rank that has failed."""
        self._barrier.abort()

    def _sum(self, operation: str, tensor: Tensor, site: str) -> Tensor:
        return torch.stack(self._meet(operation, tensor, site)).float().sum(0)

    def _meet(self, operation: str, tensor: Tensor, site: str) -> list[Tensor]:
        assert tensor.is_contiguous()
        self._count(operation, site, tensor.nbytes, tensor.nbytes * (self.world_size - 1))
        self._board[self.rank] = (operation, site, tensor.clone())
        self._barrier.wait(TIMEOUT_S)
        brought = list(self._board)
        # Nobody brings the next tensor before all have taken this one.
        self._barrier.wait(TIMEOUT_S)
        assert {(op, where) for op, where, _ in brought} == {(operation, site)}
        return [tensor for _, _, tensor in brought]

    def _count(self, operation: str, site: str, payload_bytes: int, wire_bytes: int) -> None:
        algorithm = "point_to_point" if operation in ("send", "recv") else "direct"
        self._counts.add(Call(operation, algorithm, site, payload_bytes, wire_bytes))


def thread_groups(world_size: int, name: str = "tp") -> list[ThreadGroup]:
    board, barrier = [None] * world_size, threading.Barrier(world_size)
    boxes: list[list[queue.Queue]] = [[queue.Queue() for _ in range(world_size)] for _ in range(world_size)]
    return [ThreadGroup(rank, world_size, board, barrier, boxes, name) for rank in range(world_size)]


def on_ranks(groups: Sequence[ThreadGroup], run: Callable[[ThreadGroup], Any]) -> list[Any]:
    """What `run` returns on each rank, all at the same time; the first failure of a rank is raised."""

    def guarded(group: ThreadGroup) -> Any:
        try:
            return run(group)
        except threading.BrokenBarrierError:
            raise
        except BaseException:
            group.abort()
            raise

    with ThreadPoolExecutor(len(groups)) as pool:
        futures = [pool.submit(guarded, group) for group in groups]
        errors = [error for future in futures if (error := future.exception()) is not None]
    for error in errors:
        if not isinstance(error, threading.BrokenBarrierError):
            raise error
    if errors:
        raise errors[0]
    return [future.result() for future in futures]
