"""The one door through which ranks exchange tensors."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

import torch
from torch import Tensor

from headrace.costs.sites import Phase
from headrace.parallel.exchange_counts import Calls
from headrace.parallel.ledger import ExchangeEvent, LedgerRow


class Group(Protocol):
    """Ranks that exchange tensors, in a fixed order: those of one stage (tp) or of one place in every stage (pp).

    Layers call these and never ask whether they are distributed: with one rank a collective is the identity. All ranks
    of a group make the same calls in the same order. Tensors are contiguous.

    site: what the exchange is for, as the ledger counts it: see `costs.sites.Site`.
    """

    @property
    def name(self) -> str: ...

    @property
    def rank(self) -> int: ...

    @property
    def world_size(self) -> int: ...

    def all_reduce(self, tensor: Tensor, site: str, *, out_dtype: torch.dtype | None = None) -> Tensor:
        """The sum over ranks, the same bits on each; added in rank order in float32 and rounded once.

        The result has out_dtype (the tensor's own if None) and may lie where the tensor did, which is overwritten.
        """
        ...

    def all_gather(self, tensor: Tensor, site: str, sizes: Sequence[int] | None = None) -> list[Tensor]:
        """The ranks' tensors, rank 0 first; sizes: of each rank's last dimension where these differ."""
        ...

    def reduce_scatter(self, tensor: Tensor, site: str) -> Tensor:
        """Row `rank` of the sum over ranks of tensors [world_size, ...], added as `all_reduce` does."""
        ...

    def send(self, tensor: Tensor, to: int, site: str) -> None:
        """Hand a tensor over; returns once the tensor may be changed, whether or not it was received."""
        ...

    def recv_(self, tensor: Tensor, source: int, site: str) -> None:
        """Fill a tensor with what `source` sends next."""
        ...

    def set_phase(self, phase: Phase) -> None:
        """What the calls that follow are counted as."""
        ...

    def captured(self) -> AbstractContextManager[Calls]:
        """Within it calls are noted in what it yields, and not counted: see `parallel.captured`.

        Nothing is noted where replays count by themselves, as those of native code do.
        """
        ...

    def count(self, calls: Calls) -> None:
        """Count, in the present phase, what a recording of these calls has exchanged by running again."""
        ...

    def ledger_rows(self) -> list[LedgerRow]:
        """What this rank has exchanged in this group so far."""
        ...

    def start_trace(self, max_events: int) -> None:
        """Keep calls one by one from now on, up to so many."""
        ...

    @property
    def num_dropped_events(self) -> int:
        """Calls that a full trace has left out since it was started."""
        ...

    def drain_trace(self) -> list[ExchangeEvent]:
        """The calls kept since the last time, oldest first."""
        ...


class OneRankGroup:
    """A group of one: nothing to exchange."""

    rank = 0
    world_size = 1

    def __init__(self, name: str = "tp") -> None:
        self.name = name

    def all_reduce(self, tensor: Tensor, site: str, *, out_dtype: torch.dtype | None = None) -> Tensor:  # noqa: ARG002
        return tensor if out_dtype is None else tensor.to(out_dtype)

    def all_gather(self, tensor: Tensor, site: str, sizes: Sequence[int] | None = None) -> list[Tensor]:  # noqa: ARG002
        return [tensor]

    def reduce_scatter(self, tensor: Tensor, site: str) -> Tensor:  # noqa: ARG002
        return tensor[0]

    def send(self, tensor: Tensor, to: int, site: str) -> None:  # noqa: ARG002
        raise ValueError(f"a group of one rank has no rank {to}")

    def recv_(self, tensor: Tensor, source: int, site: str) -> None:  # noqa: ARG002
        raise ValueError(f"a group of one rank has no rank {source}")

    def set_phase(self, phase: Phase) -> None:
        pass

    def captured(self) -> AbstractContextManager[Calls]:
        return nullcontext(Calls())

    def count(self, calls: Calls) -> None:
        pass

    def ledger_rows(self) -> list[LedgerRow]:
        return []

    def start_trace(self, max_events: int) -> None:
        pass

    num_dropped_events = 0

    def drain_trace(self) -> list[ExchangeEvent]:
        return []
