"""Ranks on CPUs: collectives of native code on the tensors' own memory (native/communicator.h)."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from headrace.config import AllReduceDtype
from headrace.costs.sites import Phase
from headrace.errors import KernelError, ShapeError
from headrace.kernels import NativeStream
from headrace.parallel.exchange_counts import Calls
from headrace.parallel.ledger import ExchangeEvent, LedgerRow
from headrace.parallel.native import _native

_PHASES = {Phase.PREFILL: _native.Phase.PREFILL, Phase.DECODE: _native.Phase.DECODE}
_PHASE_OF = {native: phase for phase, native in _PHASES.items()}
_DTYPES = {torch.float32: _native.DType.FLOAT32, torch.bfloat16: _native.DType.BFLOAT16}


class NativeGroup:
    """Some ranks of a communicator's world, in the order of `ranks`; see `Group`.

    An element of a sum is the same to the bit whatever message it travels in: the direct algorithm and the two-shot one
    both add in rank order in float32 and round once.

    stream: what the collectives are launched on, so that a recording of it replays them; None runs them at once.
    all_reduce_dtype: INT8 lets large sums travel in 8 bits; otherwise a sum travels in the type of its tensor, which
        is for the layers to choose.
    """

    def __init__(
        self,
        communicator: _native.Communicator,
        name: str,
        ranks: Sequence[int],
        stream: NativeStream | None = None,
        *,
        all_reduce_dtype: AllReduceDtype = AllReduceDtype.AUTO,
    ) -> None:
        self.name = name
        self._group = _native.GroupCommunicator(communicator, name, list(ranks))
        self.rank, self.world_size = self._group.rank, self._group.world_size
        self._stream = stream
        self._native_stream = None if stream is None else stream.native
        self._allows_int8 = all_reduce_dtype is AllReduceDtype.INT8
        self._channels: dict[tuple[_native.Operation, str], int] = {}

    def all_reduce(self, tensor: Tensor, site: str, *, out_dtype: torch.dtype | None = None) -> Tensor:
        """The sum over ranks; where the tensor was, unless its type changes."""
        _check_contiguous("all_reduce", tensor)
        dtype, to_dtype = _native_dtype(tensor.dtype), _native_dtype(out_dtype or tensor.dtype)
        row_size = tensor.shape[-1] if tensor.dim() else 1
        out = tensor if dtype == to_dtype else self._empty(tensor.shape, out_dtype or tensor.dtype)
        self._group.all_reduce(
            self._native_stream,
            self._channel(_native.Operation.ALL_REDUCE, site),
            _native.all_reduce_algorithm(tensor.nbytes, self.world_size, self._allows_int8),
            dtype,
            tensor.numel() // max(1, row_size),
            row_size,
            tensor.data_ptr(),
            out.data_ptr(),
            to_dtype,
        )
        return out

    def all_gather(self, tensor: Tensor, site: str, sizes: Sequence[int] | None = None) -> list[Tensor]:
        """The ranks' tensors; this rank's is the one given."""
        _check_contiguous("all_gather", tensor)
        parts = [
            tensor if rank == self.rank else self._empty(shape, tensor.dtype)
            for rank, shape in self._shapes(tensor, sizes)
        ]
        self._group.all_gather(
            self._native_stream,
            self._channel(_native.Operation.ALL_GATHER, site),
            tensor.data_ptr(),
            [part.data_ptr() for part in parts],
            [part.nbytes for part in parts],
        )
        return parts

    def reduce_scatter(self, tensor: Tensor, site: str) -> Tensor:
        _check_contiguous("reduce_scatter", tensor)
        if tensor.dim() == 0 or tensor.shape[0] != self.world_size:
            raise ShapeError(
                f"reduce_scatter takes one row for each of {self.world_size} ranks, not {list(tensor.shape)}"
            )
        dtype = _native_dtype(tensor.dtype)
        out = self._empty(tensor.shape[1:], tensor.dtype)
        self._group.reduce_scatter(
            self._native_stream,
            self._channel(_native.Operation.REDUCE_SCATTER, site),
            dtype,
            out.numel(),
            tensor.data_ptr(),
            out.data_ptr(),
            dtype,
        )
        return out

    def send(self, tensor: Tensor, to: int, site: str) -> None:
        _check_contiguous("send", tensor)
        channel = self._channel(_native.Operation.SEND, site)
        self._group.send(self._native_stream, channel, to, tensor.data_ptr(), tensor.nbytes)

    def recv_(self, tensor: Tensor, source: int, site: str) -> None:
        _check_contiguous("recv_", tensor)
        channel = self._channel(_native.Operation.RECV, site)
        self._group.recv(self._native_stream, channel, source, tensor.data_ptr(), tensor.nbytes)

    def set_phase(self, phase: Phase) -> None:
        self._group.set_phase(_PHASES[phase])

    def captured(self) -> AbstractContextManager[Calls]:
        """Notes nothing: a recorded exchange is native code, and counts itself whenever it runs."""
        return nullcontext(Calls())

    def count(self, calls: Calls) -> None:
        assert not calls, "nothing was noted"

    def ledger_rows(self) -> list[LedgerRow]:
        return [
            LedgerRow(
                operation=operation.name.lower(),
                group=self.name,
                site=site,
                phase=_PHASE_OF[phase],
                algorithm=algorithm.name.lower(),
                count=count,
                payload_bytes=payload_bytes,
                wire_bytes=wire_bytes,
                wait_s=wait_ns / 1e9,
                transfer_s=transfer_ns / 1e9,
            )
            for (
                operation,
                site,
                phase,
                algorithm,
                count,
                payload_bytes,
                wire_bytes,
                wait_ns,
                transfer_ns,
            ) in self._group.ledger_rows()
        ]

    def start_trace(self, max_events: int) -> None:
        """Keep calls one by one from here on, at most so many until they are drained; 0 keeps none."""
        self._group.start_trace(max_events)

    @property
    def num_dropped_events(self) -> int:
        """Calls that a full trace has left out since it was started."""
        return self._group.num_dropped_events

    def drain_trace(self) -> list[ExchangeEvent]:
        """The calls kept since the last time, in order; on the thread that makes them."""
        return [
            ExchangeEvent(
                operation=operation.name.lower(),
                group=self.name,
                site=site,
                phase=_PHASE_OF[phase],
                algorithm=algorithm.name.lower(),
                payload_bytes=payload_bytes,
                wire_bytes=wire_bytes,
                start_ns=start_ns,
                arrival_ns=arrival_ns or None,
                end_ns=end_ns,
            )
            for (
                operation,
                site,
                phase,
                algorithm,
                payload_bytes,
                wire_bytes,
                start_ns,
                arrival_ns,
                end_ns,
            ) in self._group.drain_trace()
        ]

    def _channel(self, operation: _native.Operation, site: str) -> int:
        key = operation, site
        if (channel := self._channels.get(key)) is None:
            channel = self._channels[key] = self._group.channel(operation, site)
        return channel

    def _shapes(self, tensor: Tensor, sizes: Sequence[int] | None) -> list[tuple[int, Sequence[int]]]:
        """Each rank with the shape of its tensor."""
        if sizes is None:
            return [(rank, tensor.shape) for rank in range(self.world_size)]
        if tensor.dim() == 0 or len(sizes) != self.world_size or sizes[self.rank] != tensor.shape[-1]:
            raise ShapeError(
                f"all_gather on rank {self.rank} of {self.world_size}: "
                f"the last dimension of {list(tensor.shape)} is not what the sizes {list(sizes)} say"
            )
        return [(rank, [*tensor.shape[:-1], size]) for rank, size in enumerate(sizes)]

    def _empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Memory for a result, from the stream where that is recorded. The stream knows the types that kernels compute
        in; others lie in memory of one of those."""
        if self._stream is None or self._native_stream is None or not self._native_stream.is_capturing:
            return torch.empty(shape, dtype=dtype)
        if dtype in _DTYPES:
            return self._stream.empty(shape, dtype)
        num_bytes = torch.Size(shape).numel() * dtype.itemsize
        memory = self._stream.empty([-(-num_bytes // 4)], torch.float32)
        return memory.view(torch.uint8)[:num_bytes].view(dtype).view(shape)


def _native_dtype(dtype: torch.dtype) -> _native.DType:
    if dtype not in _DTYPES:
        raise KernelError(f"ranks add up tensors of float32 and bfloat16, not of {dtype}")
    return _DTYPES[dtype]


def _check_contiguous(operation: str, tensor: Tensor) -> None:
    if not tensor.is_contiguous():
        raise ShapeError(f"{operation} takes contiguous tensors")
