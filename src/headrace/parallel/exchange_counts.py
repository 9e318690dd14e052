"""The calls of one group, counted by place and phase: when they are made, or when a recording of them runs."""

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

from headrace.costs.sites import Phase
from headrace.parallel.ledger import LedgerRow


class Call(NamedTuple):
    """One exchange, as the columns of `LedgerRow` name it, without its phase."""

    operation: str
    algorithm: str
    site: str
    payload_bytes: int
    wire_bytes: int


Calls = Counter[Call]
"""How often each call is made in a pass."""


class _Place(NamedTuple):
    operation: str
    algorithm: str
    site: str
    phase: Phase


@dataclass(kw_only=True)
class _Replays:
    calls: Mapping[Call, int]
    phase: Phase
    times: int = 0


@dataclass(kw_only=True)
class _Entry:
    count: int = 0
    payload_bytes: int = 0
    wire_bytes: int = 0
    transfer_s: float = 0.0


class ExchangeCounts:
    """The ledger of a group whose calls are made in Python.

    A recorded pass makes its calls once, while it is captured, and exchanges as much at each replay, without a call.
    So what is called within `captured` is noted instead of counted, and whoever replays the recording counts the notes.
    """

    def __init__(self, group: str) -> None:
        self._group = group
        self.phase = Phase.PREFILL
        self._entries: dict[_Place, _Entry] = {}
        self._notes: Calls | None = None
        self._replays: dict[tuple[int, Phase], _Replays] = {}
        """By identity of what was captured: a step replays a hundred calls, and is over in a millisecond."""

    def add(self, call: Call) -> None:
        if self._notes is None:
            self._add(call, self.phase, 1)
        else:
            self._notes[call] += 1

    def add_time(self, call: Call, phase: Phase, transfer_s: float) -> None:
        """Of a call that was counted in a phase."""
        self._entry(call, phase).transfer_s += transfer_s

    @contextmanager
    def captured(self) -> Iterator[Calls]:
        """Within it calls are noted in what it yields. Within another one of its kind too: what is counted there goes
        to the outer one's notes."""
        outer, notes = self._notes, Calls()
        self._notes = notes
        try:
            yield notes
        finally:
            self._notes = outer

    def count(self, calls: Mapping[Call, int]) -> None:
        """Calls that were captured, which stay as they are from then on."""
        if self._notes is not None:
            self._notes.update(calls)
            return
        key = id(calls), self.phase
        if key not in self._replays:
            self._replays[key] = _Replays(calls=calls, phase=self.phase)
        self._replays[key].times += 1

    def rows(self) -> list[LedgerRow]:
        self._add_replays()
        return [
            LedgerRow(
                operation=place.operation,
                group=self._group,
                site=place.site,
                phase=place.phase,
                algorithm=place.algorithm,
                count=entry.count,
                payload_bytes=entry.payload_bytes,
                wire_bytes=entry.wire_bytes,
                wait_s=None,
                transfer_s=entry.transfer_s,
            )
            for place, entry in self._entries.items()
        ]

    def _add_replays(self) -> None:
        replays, self._replays = self._replays, {}
        for replayed in replays.values():
            for call, times in replayed.calls.items():
                self._add(call, replayed.phase, times * replayed.times)

    def _add(self, call: Call, phase: Phase, times: int) -> None:
        entry = self._entry(call, phase)
        entry.count += times
        entry.payload_bytes += times * call.payload_bytes
        entry.wire_bytes += times * call.wire_bytes

    def _entry(self, call: Call, phase: Phase) -> _Entry:
        return self._entries.setdefault(_Place(call.operation, call.algorithm, call.site, phase), _Entry())
