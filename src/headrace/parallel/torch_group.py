"""A group over torch.distributed: NCCL between GPUs, gloo as the reference for CPUs."""

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from headrace.costs.sites import Phase
from headrace.errors import RankError
from headrace.parallel.ledger import ExchangeEvent, LedgerRow

_MAX_LEAVING = 16
"""Messages that may be under way at once: more than stages of a pipeline have."""


@dataclass(kw_only=True)
class _Entry:
    count: int = 0
    payload_bytes: int = 0
    wire_bytes: int = 0
    transfer_s: float = 0.0


class TorchGroup:
    """A `Group` whose exchanges are torch.distributed's.

    gloo: a sum is gathered and added here, in rank order, so that it has the bits that `Group` promises.
    nccl: a sum is NCCL's own, over a ring, whose order of additions differs from one place of a tensor to the next.
    """

    def __init__(self, name: str, process_group: dist.ProcessGroup, backend: str) -> None:
        self.name = name
        self.rank, self.world_size = process_group.rank(), process_group.size()
        self._process_group = process_group
        self._backend = backend
        self._phase = Phase.PREFILL
        self._max_events = 0
        self._events: list[ExchangeEvent] = []
        self.num_dropped_events = 0
        self._leaving: deque[tuple[dist.Work, Tensor]] = deque()
        self._entries: dict[tuple[str, str, str, Phase], _Entry] = {}

    def all_reduce(self, tensor: Tensor, site: str, *, out_dtype: torch.dtype | None = None) -> Tensor:
        out_dtype = out_dtype or tensor.dtype
        if self._backend == "nccl":
            wire = 2 * (self.world_size - 1) * tensor.nbytes // self.world_size
            self._run("all_reduce", "ring", site, tensor.nbytes, wire, lambda: self._process_group.allreduce([tensor]))
            return tensor.to(out_dtype)
        parts = self._gather("all_reduce", "direct", tensor, site, [tensor.shape] * self.world_size)
        total = parts[0].float()
        for part in parts[1:]:
            total += part
        return total.to(out_dtype)

    def all_gather(self, tensor: Tensor, site: str, sizes: Sequence[int] | None = None) -> list[Tensor]:
        sizes = sizes or [tensor.shape[-1]] * self.world_size
        shapes = [torch.Size([*tensor.shape[:-1], size]) for size in sizes]
        return self._gather("all_gather", "direct", tensor, site, shapes)

    def reduce_scatter(self, tensor: Tensor, site: str) -> Tensor:
        """Everything is gathered, so that the order of additions is the ranks'; the ledger counts what is sent."""
        parts = self._gather("reduce_scatter", "direct", tensor, site, [tensor.shape] * self.world_size)
        total = parts[0][self.rank].float()
        for part in parts[1:]:
            total += part[self.rank]
        return total.to(tensor.dtype)

    def send(self, tensor: Tensor, to: int, site: str) -> None:
        sent = tensor.clone()
        work = self._run(
            "send",
            "point_to_point",
            site,
            tensor.nbytes,
            tensor.nbytes,
            lambda: self._process_group.send([sent], to, 0),
            waits=False,
        )
        # Both must live until the message has left.
        self._leaving.append((work, sent))
        if len(self._leaving) > _MAX_LEAVING:
            oldest, _ = self._leaving.popleft()
            self._wait(oldest, "send", site)

    def recv_(self, tensor: Tensor, source: int, site: str) -> None:
        found = torch.empty_like(tensor)
        self._run(
            "recv", "point_to_point", site, tensor.nbytes, 0, lambda: self._process_group.recv([found], source, 0)
        )
        # Copied by an op of torch, which a recording notices: it could not run an exchange of torch's again.
        tensor.copy_(found)

    def set_phase(self, phase: Phase) -> None:
        self._phase = phase

    def ledger_rows(self) -> list[LedgerRow]:
        return [
            LedgerRow(
                operation=operation,
                group=self.name,
                site=site,
                phase=phase,
                algorithm=algorithm,
                count=entry.count,
                payload_bytes=entry.payload_bytes,
                wire_bytes=entry.wire_bytes,
                wait_s=None,
                transfer_s=entry.transfer_s,
            )
            for (operation, algorithm, site, phase), entry in self._entries.items()
        ]

    def start_trace(self, max_events: int) -> None:
        self._max_events, self._events, self.num_dropped_events = max_events, [], 0

    def drain_trace(self) -> list[ExchangeEvent]:
        events, self._events = self._events, []
        return events

    def _gather(
        self, operation: str, algorithm: str, tensor: Tensor, site: str, shapes: Sequence[torch.Size]
    ) -> list[Tensor]:
        """Everybody's tensor. torch gathers equal sizes alone, so the shorter ones are padded with what is not read."""
        longest = max(shape.numel() for shape in shapes)
        mine = torch.zeros(longest, dtype=tensor.dtype, device=tensor.device)
        mine[: tensor.numel()] = tensor.flatten()
        found = [torch.empty_like(mine) for _ in shapes]
        self._run(
            operation,
            algorithm,
            site,
            tensor.nbytes,
            (self.world_size - 1) * tensor.nbytes,
            lambda: self._process_group.allgather([found], [mine]),
        )
        return [part[: shape.numel()].view(shape) for part, shape in zip(found, shapes, strict=True)]

    def _run(
        self,
        operation: str,
        algorithm: str,
        site: str,
        payload_bytes: int,
        wire_bytes: int,
        start: Callable[[], dist.Work],
        *,
        waits: bool = True,
    ) -> dist.Work:
        start_ns = time.monotonic_ns()
        try:
            work = start()
        except RuntimeError as error:
            raise self._error(operation, site, error) from None
        if waits:
            self._wait(work, operation, site)
        entry = self._entries.setdefault((operation, algorithm, site, self._phase), _Entry())
        entry.count += 1
        entry.payload_bytes += payload_bytes
        entry.wire_bytes += wire_bytes
        end_ns = time.monotonic_ns()
        entry.transfer_s += (end_ns - start_ns) / 1e9
        if self._max_events:
            self._trace(
                ExchangeEvent(
                    operation=operation,
                    group=self.name,
                    site=site,
                    phase=self._phase,
                    algorithm=algorithm,
                    payload_bytes=payload_bytes,
                    wire_bytes=wire_bytes,
                    start_ns=start_ns,
                    arrival_ns=None,
                    end_ns=end_ns,
                )
            )
        return work

    def _wait(self, work: dist.Work, operation: str, site: str) -> None:
        try:
            work.wait()
        except RuntimeError as error:
            raise self._error(operation, site, error) from None

    def _error(self, operation: str, site: str, error: RuntimeError) -> RankError:
        return RankError(f"{operation} at {site} of group {self.name} failed: {str(error)[:200]}")

    def _trace(self, event: ExchangeEvent) -> None:
        if len(self._events) < self._max_events:
            self._events.append(event)
        else:
            self.num_dropped_events += 1
