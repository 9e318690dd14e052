"""What every rank did when, on one clock, in the format that Perfetto and chrome://tracing open.

Source: the Trace Event Format, "complete" events (ph X) with times in microseconds.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from headrace.costs.sites import Phase
from headrace.parallel.ledger import ExchangeEvent

MAX_EVENTS = 200_000
"""Exchanges of one group, and steps of one rank. Later ones are left out; exchanges left out are counted."""

_COMPUTE, _EXCHANGES = 0, 1
"""Thread ids of a rank's two tracks."""


class StepEvent(NamedTuple):
    """A step as one rank ran it, on the same clock as `ExchangeEvent`."""

    step: int
    phase: Phase
    num_tokens: int
    num_seqs: int
    start_ns: int
    end_ns: int


@dataclass(frozen=True, kw_only=True)
class RankTrace:
    """host_offset_ns: to be taken from this rank's times to have them on rank 0's clock; 0 on the same host."""

    name: str
    steps: Sequence[StepEvent]
    exchanges: Sequence[ExchangeEvent]
    num_dropped: int = 0
    host_offset_ns: int = 0

    def to_data(self) -> dict[str, Any]:
        """Plain data, fit for JSON."""
        return {
            "name": self.name,
            "steps": [step._replace(phase=step.phase.value) for step in self.steps],  # type: ignore[arg-type]
            "exchanges": [list((vars(event) | {"phase": event.phase.value}).values()) for event in self.exchanges],
            "num_dropped": self.num_dropped,
        }

    @classmethod
    def from_data(cls, data: dict[str, Any], host_offset_ns: int) -> "RankTrace":
        """What `to_data` wrote."""
        fields = tuple(ExchangeEvent.__dataclass_fields__)
        exchanges = (dict(zip(fields, values, strict=True)) for values in data["exchanges"])
        return cls(
            name=data["name"],
            steps=[StepEvent(*values)._replace(phase=Phase(values[1])) for values in data["steps"]],
            exchanges=[ExchangeEvent(**(event | {"phase": Phase(event["phase"])})) for event in exchanges],
            num_dropped=data["num_dropped"],
            host_offset_ns=host_offset_ns,
        )


def write_trace(ranks: Sequence[RankTrace], file: Path) -> None:
    """One process for each rank, with a track for steps and what they compute, and one for exchanges.

    Raises:
        OSError: the file cannot be written.
    """
    starts = [step.start_ns - rank.host_offset_ns for rank in ranks for step in rank.steps]
    origin_ns = min(starts, default=0)
    events = [event for i, rank in enumerate(ranks) for event in _events(i, rank, origin_ns + rank.host_offset_ns)]
    content = {
        "traceEvents": events,
        "displayTimeUnit": "ms",
        "otherData": {"num_dropped_events": [rank.num_dropped for rank in ranks]},
    }
    file.write_text(json.dumps(content), encoding="utf-8")


def _events(pid: int, rank: RankTrace, origin_ns: int) -> Iterator[dict[str, Any]]:
    yield {"name": "process_name", "ph": "M", "pid": pid, "tid": 0, "args": {"name": rank.name}}
    for tid, name in ((_COMPUTE, "steps and compute"), (_EXCHANGES, "exchanges")):
        yield {"name": "thread_name", "ph": "M", "pid": pid, "tid": tid, "args": {"name": name}}

    def slice_of(name: str, tid: int, start_ns: int, end_ns: int, **arguments: Any) -> dict[str, Any]:
        return {
            "name": name,
            "ph": "X",
            "pid": pid,
            "tid": tid,
            "ts": (start_ns - origin_ns) / 1e3,
            "dur": (end_ns - start_ns) / 1e3,
            "args": arguments,
        }

    for step in rank.steps:
        name = f"{step.phase.value} step"
        facts = {"step": step.step, "num_tokens": step.num_tokens, "num_seqs": step.num_seqs}
        yield slice_of(name, _COMPUTE, step.start_ns, step.end_ns, **facts)
    for start_ns, end_ns in compute_intervals(rank.steps, rank.exchanges):
        yield slice_of("compute", _COMPUTE, start_ns, end_ns)
    for event in rank.exchanges:
        call = {
            "site": event.site,
            "group": event.group,
            "algorithm": event.algorithm,
            "payload_bytes": event.payload_bytes,
            "wire_bytes": event.wire_bytes,
        }
        yield slice_of(event.operation, _EXCHANGES, event.start_ns, event.end_ns, **call)
        if event.arrival_ns is not None and event.arrival_ns > event.start_ns:
            yield slice_of("wait", _EXCHANGES, event.start_ns, event.arrival_ns)


def compute_intervals(steps: Iterable[StepEvent], exchanges: Sequence[ExchangeEvent]) -> Iterator[tuple[int, int]]:
    """What of the steps is not spent in exchanges, as (start_ns, end_ns); both are in the order of their times."""
    index = 0
    for step in steps:
        start_ns = step.start_ns
        while index < len(exchanges) and exchanges[index].start_ns < step.end_ns:
            event = exchanges[index]
            if event.start_ns > start_ns:
                yield start_ns, event.start_ns
            start_ns = max(start_ns, event.end_ns)
            index += 1
        if step.end_ns > start_ns:
            yield start_ns, step.end_ns
