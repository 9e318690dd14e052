"""What was exchanged: the columns of the ledger."""

from dataclasses import dataclass
from typing import Any, Self

from headrace.costs.sites import Phase


@dataclass(frozen=True, kw_only=True)
class LedgerRow:
    """What one rank exchanged at one place in one phase.

    operation: all_reduce, all_gather, reduce_scatter, send or recv.
    algorithm: what wire_bytes hold for: "direct" (each rank to each other), "two_shot" (reduce-scatter and all-gather,
        both direct), "two_shot_int8" (the same in 8 bits, with a float32 scale for each 64 values), "ring",
        "point_to_point".
    count: calls.
    payload_bytes: of the tensors this rank handed to its calls (those it received, for recv).
    wire_bytes: what this rank sent.
    wait_s: until the last of the others had come; transfer_s: from then on. None where the library below does not
        tell them apart, and then all of it is transfer.
    """

    operation: str
    group: str
    site: str
    phase: Phase
    algorithm: str
    count: int
    payload_bytes: int
    wire_bytes: int
    wait_s: float | None
    transfer_s: float

    def to_data(self) -> dict[str, Any]:
        """Plain data, fit for JSON."""
        return vars(self) | {"phase": self.phase.value}

    @classmethod
    def from_data(cls, data: dict[str, Any]) -> Self:
        """What `to_data` wrote."""
        return cls(**(data | {"phase": Phase(data["phase"])}))


@dataclass(frozen=True, kw_only=True)
class ExchangeEvent:
    """One call, as `LedgerRow` counts it, on the clock that the processes of a host share (CLOCK_MONOTONIC).

    arrival_ns: when the last of the other ranks came, None where none was waited for.
    """

    operation: str
    group: str
    site: str
    phase: Phase
    algorithm: str
    payload_bytes: int
    wire_bytes: int
    start_ns: int
    arrival_ns: int | None
    end_ns: int
