"""What ranks exchange, in closed form: the columns of the ledger without its times, predicted.

What a forward pass exchanges follows from its number of tokens, so a run's exchanges are a sum over the kinds of passes
that occurred, each times how often: linear in those counts. Derivations: docs/communication.md. Knows nothing about the
ledger, which in turn knows nothing of this; whoever has both compares them by `differences`.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from headrace.costs.exchanges import Exchange, Layout, RankCalls
from headrace.costs.sites import Phase
from headrace.costs.steps import Event, RequestShape, Run, request_run

_COLUMNS = ("count", "payload_bytes", "wire_bytes")


class Counted(Protocol):
    """What a row of the ledger and a predicted one have in common."""

    @property
    def operation(self) -> str: ...

    @property
    def group(self) -> str: ...

    @property
    def site(self) -> str: ...

    @property
    def phase(self) -> Phase: ...

    @property
    def algorithm(self) -> str: ...

    @property
    def count(self) -> int: ...

    @property
    def payload_bytes(self) -> int: ...

    @property
    def wire_bytes(self) -> int: ...


@dataclass(frozen=True, kw_only=True)
class VolumeRow:
    """What one rank exchanges at one place in one phase: the columns of `parallel.ledger.LedgerRow` but for times."""

    operation: str
    group: str
    site: str
    phase: Phase
    algorithm: str
    count: int
    payload_bytes: int
    wire_bytes: int


class Sums(NamedTuple):
    """Calls of one rank, the payload it handed to them (or received) and what it sent for them."""

    num_calls: int = 0
    payload_bytes: int = 0
    wire_bytes: int = 0

    def plus(self, other: "Sums", times: int = 1) -> "Sums":
        return Sums(
            self.num_calls + times * other.num_calls,
            self.payload_bytes + times * other.payload_bytes,
            self.wire_bytes + times * other.wire_bytes,
        )


class ExchangeKind(NamedTuple):
    """What figures are added up by where nobody asks for the place."""

    group: str
    operation: str
    phase: Phase


class RankVolume:
    """What one rank exchanges. Keeps what it has worked out for each kind of pass, so that a prediction for a run of
    known kinds takes microseconds."""

    def __init__(self, layout: Layout, rank: int) -> None:
        self._calls = RankCalls(layout, rank)
        self._exchanges: dict[Event, tuple[Exchange, ...]] = {}
        self._totals: dict[Event, dict[ExchangeKind, Sums]] = {}

    def exchanges(self, event: Event) -> tuple[Exchange, ...]:
        """The calls of one pass, in order."""
        if event not in self._exchanges:
            self._exchanges[event] = tuple(self._calls.of(event))
        return self._exchanges[event]

    def totals(self, run: Run) -> dict[ExchangeKind, Sums]:
        """Everything by kind: what a self-check compares first, and cheapest."""
        totals: dict[ExchangeKind, Sums] = {}
        for event, times in run.items():
            found = self._totals.get(event)
            if found is None:
                found = self._totals[event] = self._totals_of(event)
            add_totals(totals, found, times)
        return totals

    def rows(self, run: Run) -> list[VolumeRow]:
        """The same place by place, as the ledger has it."""
        sums: defaultdict[tuple[str, str, str, Phase, str], Sums] = defaultdict(Sums)
        for event, times in run.items():
            for exchange in self.exchanges(event):
                more = _one_site(exchange)
                for site in exchange.sites:
                    place = (exchange.operation, exchange.group, site, event.phase, exchange.algorithm)
                    sums[place] = sums[place].plus(more, times)
        return [
            VolumeRow(
                operation=operation,
                group=group,
                site=site,
                phase=phase,
                algorithm=algorithm,
                count=total.num_calls,
                payload_bytes=total.payload_bytes,
                wire_bytes=total.wire_bytes,
            )
            for (operation, group, site, phase, algorithm), total in sums.items()
        ]

    def _totals_of(self, event: Event) -> dict[ExchangeKind, Sums]:
        totals: dict[ExchangeKind, Sums] = {}
        for exchange in self.exchanges(event):
            if exchange.sites and exchange.calls_per_site:
                kind = ExchangeKind(exchange.group, exchange.operation, event.phase)
                add_totals(totals, {kind: _one_site(exchange)}, len(exchange.sites))
        return totals


def _one_site(exchange: Exchange) -> Sums:
    times = exchange.calls_per_site
    return Sums(times, times * exchange.payload_bytes, times * exchange.wire_bytes)


def add_totals(totals: dict[ExchangeKind, Sums], more: Mapping[ExchangeKind, Sums], times: int = 1) -> None:
    """Add `more` to `totals`, so many times."""
    for kind, sums in more.items():
        totals[kind] = totals.get(kind, Sums()).plus(sums, times)


def totals_of(rows: Iterable[Counted]) -> dict[ExchangeKind, Sums]:
    """Rows of one account by kind; no kind that nothing was exchanged of."""
    totals: dict[ExchangeKind, Sums] = {}
    for row in rows:
        if row.count:
            kind = ExchangeKind(row.group, row.operation, row.phase)
            add_totals(totals, {kind: Sums(row.count, row.payload_bytes, row.wire_bytes)})
    return totals


def predict_run(layout: Layout, run: Run) -> list[list[VolumeRow]]:
    """What each rank exchanges, rank 0 first."""
    return [RankVolume(layout, rank).rows(run) for rank in range(layout.parallel.world_size)]


def predict_request(layout: Layout, request: RequestShape, max_num_batched_tokens: int) -> list[list[VolumeRow]]:
    """What each rank exchanges for a batch of requests, rank 0 first.

    Smaller chunks of the prompt mean more calls of as many payload bytes; where stages work at the same time, a prompt
    comes in chunks as well (`micro_batches`). Wire bytes may differ all the same, where messages become small enough
    for another algorithm (`algorithms.all_reduce_algorithm`).
    """
    return predict_run(layout, request_run(request, max_num_batched_tokens, layout.parallel.pipeline_parallel_size))


def differences(predicted: Iterable[Counted], counted: Iterable[Counted]) -> Iterator[str]:
    """Every figure in which two accounts of the same rank differ, one line each; nothing if they agree to the byte."""
    expected, found = _by_place(predicted), _by_place(counted)
    for place in sorted({*expected, *found}):
        mine, its = expected.get(place, Sums()), found.get(place, Sums())
        for name, predicted_value, counted_value in zip(_COLUMNS, mine, its, strict=True):
            if predicted_value != counted_value:
                yield f"{' '.join(place)}: {name} is {counted_value:,}, predicted {predicted_value:,}"


def _by_place(rows: Iterable[Counted]) -> dict[tuple[str, ...], Sums]:
    places: defaultdict[tuple[str, ...], Sums] = defaultdict(Sums)
    for row in rows:
        place = (row.phase.value, row.group, row.site, row.operation, row.algorithm)
        places[place] = places[place].plus(Sums(row.count, row.payload_bytes, row.wire_bytes))
    return {place: sums for place, sums in places.items() if any(sums)}
