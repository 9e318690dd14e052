"""A group over NCCL, between GPUs."""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import AllgatherOptions, AllreduceOptions, AllToAllOptions

from headrace.costs.algorithms import (
    DIRECT,
    POINT_TO_POINT,
    RING,
    Summands,
    all_gather_wire_bytes,
    all_reduce_wire_bytes,
)
from headrace.costs.sites import Phase
from headrace.errors import RankError, ShapeError
from headrace.parallel.exchange_counts import Call, Calls, ExchangeCounts
from headrace.parallel.exchange_events import ExchangeEvents
from headrace.parallel.ledger import ExchangeEvent, LedgerRow
from headrace.parallel.nccl_errors import explain_nccl

_MAX_PENDING = 256
"""Exchanges whose times are left unread: those of a pass of 128 layers."""

_SITE_OF_CONNECTING = "connect"


class NcclGroup:
    """A `Group` whose exchanges are kernels on torch's current stream: in order with all others on it, captured by a
    CUDA graph like them, and never waited for by the host.

    A sum is NCCL's own: added in the type of its summands and rounded after each addition, in an order that differs
    from one place of a tensor to the next, though its bits are the same on every rank. A reduce-scatter is as `Group`
    promises.

    wire_bytes are not what was seen on a wire but what follows from an algorithm: NCCL does not tell which one it has
    chosen. A ring is assumed for sums and gathers.

    events: for times of what is called; what is replayed has none.
    failure: why exchanges have been ended, if they have: then nothing that comes from them is valid.
    """

    def __init__(
        self,
        name: str,
        process_group: dist.ProcessGroup,
        events: ExchangeEvents,
        failure: Callable[[], str | None] = lambda: None,
    ) -> None:
        self.name = name
        self.rank, self.world_size = process_group.rank(), process_group.size()
        self.events = events
        self._process_group = process_group
        self._failure = failure
        self._counts = ExchangeCounts(name)
        self._max_events = 0
        self._trace: list[ExchangeEvent] = []
        self.num_dropped_events = 0

    def connect(self, operations: Collection[str], device: torch.device) -> None:
        """Make the first call of each operation, uncounted. All ranks of the group do.

        It connects the ranks, which waits for them and allocates memory: a graph that is captured allows neither.

        Raises:
            RankError: a rank is missing.
        """
        ones = torch.ones(self.world_size, 1, device=device)
        with self.captured():
            if "all_gather" in operations:
                self.all_gather(ones, _SITE_OF_CONNECTING)
            if "reduce_scatter" in operations:
                self.reduce_scatter(ones, _SITE_OF_CONNECTING)
            if "send" in operations:
                self._connect_neighbours(ones)
            total = self.all_reduce(ones, _SITE_OF_CONNECTING)
        found = total[0].item()
        self._check()
        if found != self.world_size:
            raise RankError(f"group {self.name} of {self.world_size} ranks has a sum of {found:g} of as many ones")

    def all_reduce(self, tensor: Tensor, site: str, *, out_dtype: torch.dtype | None = None) -> Tensor:
        """The sum, where the tensor was, unless its type changes."""
        _check_contiguous("all_reduce", tensor)
        sent = _ring_sum_bytes(tensor.numel(), tensor.itemsize, self.rank, self.world_size)
        options = AllreduceOptions()
        options.asyncOp = False
        with self._called(Call("all_reduce", RING, site, tensor.nbytes, sent)):
            self._process_group.allreduce([tensor], options).wait()
        return tensor if out_dtype is None else tensor.to(out_dtype)

    def all_gather(self, tensor: Tensor, site: str, sizes: Sequence[int] | None = None) -> list[Tensor]:
        """The ranks' tensors. NCCL gathers equal sizes alone, so the shorter ones are padded with what is not read."""
        _check_contiguous("all_gather", tensor)
        sizes = sizes or [tensor.shape[-1]] * self.world_size
        shapes = [torch.Size([*tensor.shape[:-1], size]) for size in sizes]
        longest = max(shape.numel() for shape in shapes)
        mine = tensor.view(-1)
        if len(mine) < longest:
            mine = torch.nn.functional.pad(mine, (0, longest - len(mine)))
        found = torch.empty(self.world_size, longest, dtype=tensor.dtype, device=tensor.device)
        options = AllgatherOptions()
        options.asyncOp = False
        sent = all_gather_wire_bytes(mine.nbytes, self.world_size)
        with self._called(Call("all_gather", RING, site, tensor.nbytes, sent)):
            self._process_group._allgather_base(found.view(-1), mine, options).wait()
        return [part[: shape.numel()].view(shape) for part, shape in zip(found.unbind(), shapes, strict=True)]

    def reduce_scatter(self, tensor: Tensor, site: str) -> Tensor:
        """Rows go to the ranks they are for, which add them up in rank order: as many bytes as a ring would send."""
        _check_contiguous("reduce_scatter", tensor)
        if tensor.dim() == 0 or tensor.shape[0] != self.world_size:
            raise ShapeError(
                f"reduce_scatter takes one row for each of {self.world_size} ranks, not {list(tensor.shape)}"
            )
        found = torch.empty_like(tensor)
        options = AllToAllOptions()
        options.asyncOp = False
        sent = tensor.nbytes - tensor[0].nbytes
        with self._called(Call("reduce_scatter", DIRECT, site, tensor.nbytes, sent)):
            self._process_group.alltoall_base(found, tensor, [], [], options).wait()
        total = found[0].float()
        for row in found[1:]:
            total += row
        return total.to(tensor.dtype)

    def send(self, tensor: Tensor, to: int, site: str) -> None:
        """What comes later on the stream may change the tensor."""
        _check_contiguous("send", tensor)
        with self._called(Call("send", POINT_TO_POINT, site, tensor.nbytes, tensor.nbytes)):
            self._process_group.send([tensor], to, 0).wait()

    def recv_(self, tensor: Tensor, source: int, site: str) -> None:
        _check_contiguous("recv_", tensor)
        with self._called(Call("recv", POINT_TO_POINT, site, tensor.nbytes, 0)):
            self._process_group.recv([tensor], source, 0).wait()

    def set_phase(self, phase: Phase) -> None:
        self._counts.phase = phase

    @contextmanager
    def captured(self) -> Iterator[Calls]:
        with self.events.paused(), self._counts.captured() as calls:
            yield calls

    def count(self, calls: Calls) -> None:
        """
        Raises:
            RankError: exchanges have been ended, so that the replay has exchanged nothing.
        """
        self._check()
        self._counts.count(calls)
        self.events.mark_replay(self._counts.phase)
        if self._max_events:
            self.num_dropped_events += calls.total()
        if len(self.events) > _MAX_PENDING:
            self._read_times()

    def ledger_rows(self) -> list[LedgerRow]:
        """transfer_s: on the GPU, waiting for others included, of what was called and is over."""
        self._read_times()
        return self._counts.rows()

    def start_trace(self, max_events: int) -> None:
        """Waits for the stream. Exchanges of a replayed pass have no times, and count as dropped."""
        self._max_events = 0
        self.events.set_anchor()
        self._read_times()
        self._max_events, self._trace, self.num_dropped_events = max_events, [], 0

    def drain_trace(self) -> list[ExchangeEvent]:
        self._read_times()
        events, self._trace = self._trace, []
        return events

    def abort(self) -> None:
        """End the exchanges under way and all to come. May wait until graphs that hold some have been destroyed."""
        self._process_group.abort()

    @contextmanager
    def _called(self, call: Call) -> Iterator[None]:
        """Around the start of an exchange."""
        self._check()
        begin = self.events.begin()
        try:
            yield
        except RuntimeError as error:
            self._check()
            message = f"{call.operation} at {call.site} of group {self.name} failed: {explain_nccl(error)}"
            raise RankError(message) from None
        self.events.end(begin, call, self._counts.phase)
        self._counts.add(call)
        if len(self.events) > _MAX_PENDING:
            self._read_times()

    def _check(self) -> None:
        if (failure := self._failure()) is not None:
            raise RankError(failure)

    def _connect_neighbours(self, tensor: Tensor) -> None:
        """From each rank to the next, as stages do."""
        if self.rank > 0:
            self.recv_(torch.empty_like(tensor), self.rank - 1, _SITE_OF_CONNECTING)
        if self.rank < self.world_size - 1:
            self.send(tensor, self.rank + 1, _SITE_OF_CONNECTING)

    def _read_times(self) -> None:
        for timed in self.events.take_finished():
            self._counts.add_time(timed.call, timed.phase, timed.duration_s)
            if self._max_events and timed.begin_ns is not None:
                self._add_to_trace(timed.call, timed.phase, timed.begin_ns, int(timed.duration_s * 1e9))

    def _add_to_trace(self, call: Call, phase: Phase, begin_ns: int, duration_ns: int) -> None:
        if len(self._trace) == self._max_events:
            self.num_dropped_events += 1
            return
        event = ExchangeEvent(
            operation=call.operation,
            group=self.name,
            site=call.site,
            phase=phase,
            algorithm=call.algorithm,
            payload_bytes=call.payload_bytes,
            wire_bytes=call.wire_bytes,
            start_ns=begin_ns,
            arrival_ns=None,
            end_ns=begin_ns + duration_ns,
        )
        self._trace.append(event)


@lru_cache(maxsize=1024)
def _ring_sum_bytes(num_elements: int, element_bytes: int, rank: int, world_size: int) -> int:
    summands = Summands(num_rows=1, row_size=num_elements, summand_bytes=element_bytes, sum_bytes=element_bytes)
    return all_reduce_wire_bytes(summands, RING, rank, world_size)


def _check_contiguous(operation: str, tensor: Tensor) -> None:
    if not tensor.is_contiguous():
        raise ShapeError(f"{operation} takes contiguous tensors")
