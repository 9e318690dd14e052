"""A group over gloo, torch.distributed's transport for CPUs."""

import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import torch
import torch.distributed as dist
from torch import Tensor

from headrace.costs.sites import Phase
from headrace.errors import RankError
from headrace.parallel.exchange_counts import Call, Calls, ExchangeCounts
from headrace.parallel.ledger import ExchangeEvent, LedgerRow

_MAX_LEAVING = 16
"""Messages that may be under way at once: more than stages of a pipeline have."""


class TorchGroup:
    """A `Group` whose exchanges are gloo's. A sum is gathered and added here, in rank order, so that it has the bits
    that `Group` promises."""

    def __init__(self, name: str, process_group: dist.ProcessGroup) -> None:
        self.name = name
        self.rank, self.world_size = process_group.rank(), process_group.size()
        self._process_group = process_group
        self._max_events = 0
        self._events: list[ExchangeEvent] = []
        self.num_dropped_events = 0
        self._leaving: deque[tuple[dist.Work, Tensor]] = deque()
        self._counts = ExchangeCounts(name)

    def all_reduce(self, tensor: Tensor, site: str, *, out_dtype: torch.dtype | None = None) -> Tensor:
        parts = self._gather("all_reduce", tensor, site, [tensor.shape] * self.world_size)
        total = parts[0].float()
        for part in parts[1:]:
            total += part
        return total.to(out_dtype or tensor.dtype)

    def all_gather(self, tensor: Tensor, site: str, sizes: Sequence[int] | None = None) -> list[Tensor]:
        sizes = sizes or [tensor.shape[-1]] * self.world_size
        shapes = [torch.Size([*tensor.shape[:-1], size]) for size in sizes]
        return self._gather("all_gather", tensor, site, shapes)

    def reduce_scatter(self, tensor: Tensor, site: str) -> Tensor:
        """Everything is gathered, so that the order of additions is the ranks'; the ledger counts what is sent."""
        parts = self._gather("reduce_scatter", tensor, site, [tensor.shape] * self.world_size)
        total = parts[0][self.rank].float()
        for part in parts[1:]:
            total += part[self.rank]
        return total.to(tensor.dtype)

    def send(self, tensor: Tensor, to: int, site: str) -> None:
        sent = tensor.clone()
        call = Call("send", "point_to_point", site, tensor.nbytes, tensor.nbytes)
        work = self._run(call, lambda: self._process_group.send([sent], to, 0), waits=False)
        # Both must live until the message has left.
        self._leaving.append((work, sent))
        if len(self._leaving) > _MAX_LEAVING:
            oldest, _ = self._leaving.popleft()
            self._wait(oldest, call)

    def recv_(self, tensor: Tensor, source: int, site: str) -> None:
        found = torch.empty_like(tensor)
        call = Call("recv", "point_to_point", site, tensor.nbytes, 0)
        self._run(call, lambda: self._process_group.recv([found], source, 0))
        # Copied by an op of torch, which a recording notices: it could not run an exchange of torch's again.
        tensor.copy_(found)

    def set_phase(self, phase: Phase) -> None:
        self._counts.phase = phase

    def captured(self) -> AbstractContextManager[Calls]:
        return self._counts.captured()

    def count(self, calls: Calls) -> None:
        self._counts.count(calls)

    def ledger_rows(self) -> list[LedgerRow]:
        return self._counts.rows()

    def start_trace(self, max_events: int) -> None:
        self._max_events, self._events, self.num_dropped_events = max_events, [], 0

    def drain_trace(self) -> list[ExchangeEvent]:
        events, self._events = self._events, []
        return events

    def _gather(self, operation: str, tensor: Tensor, site: str, shapes: Sequence[torch.Size]) -> list[Tensor]:
        """Everybody's tensor. torch gathers equal sizes alone, so the shorter ones are padded with what is not read."""
        longest = max(shape.numel() for shape in shapes)
        mine = torch.zeros(longest, dtype=tensor.dtype, device=tensor.device)
        mine[: tensor.numel()] = tensor.flatten()
        found = [torch.empty_like(mine) for _ in shapes]
        call = Call(operation, "direct", site, tensor.nbytes, (self.world_size - 1) * tensor.nbytes)
        self._run(call, lambda: self._process_group.allgather([found], [mine]))
        return [part[: shape.numel()].view(shape) for part, shape in zip(found, shapes, strict=True)]

    def _run(self, call: Call, start: Callable[[], dist.Work], *, waits: bool = True) -> dist.Work:
        start_ns = time.monotonic_ns()
        try:
            work = start()
        except RuntimeError as error:
            raise self._error(call, error) from None
        if waits:
            self._wait(work, call)
        end_ns = time.monotonic_ns()
        self._counts.add(call)
        self._counts.add_time(call, self._counts.phase, (end_ns - start_ns) / 1e9)
        self._trace(call, start_ns, end_ns)
        return work

    def _wait(self, work: dist.Work, call: Call) -> None:
        try:
            work.wait()
        except RuntimeError as error:
            raise self._error(call, error) from None

    def _error(self, call: Call, error: RuntimeError) -> RankError:
        return RankError(f"{call.operation} at {call.site} of group {self.name} failed: {str(error)[:200]}")

    def _trace(self, call: Call, start_ns: int, end_ns: int) -> None:
        if not self._max_events:
            return
        if len(self._events) == self._max_events:
            self.num_dropped_events += 1
            return
        event = ExchangeEvent(
            operation=call.operation,
            group=self.name,
            site=call.site,
            phase=self._counts.phase,
            algorithm=call.algorithm,
            payload_bytes=call.payload_bytes,
            wire_bytes=call.wire_bytes,
            start_ns=start_ns,
            arrival_ns=None,
            end_ns=end_ns,
        )
        self._events.append(event)
