"""What a rank has counted since it was loaded, as the engine asks for it now and then."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Self

from headrace.costs.sites import Phase
from headrace.costs.volume import ExchangeKind, Sums, add_totals


@dataclass(frozen=True, kw_only=True)
class RankStatistics:
    """counted: by the ledgers of its groups; predicted: from the plans it has run, by formula alone.

    num_softmax_rows: that the asynchronized softmax has computed in all layers of the rank, a query of one head each;
        num_recomputed_rows: of them a second time.
    """

    counted: Mapping[ExchangeKind, Sums]
    predicted: Mapping[ExchangeKind, Sums]
    num_softmax_rows: int
    num_recomputed_rows: int

    def to_data(self) -> list[Any]:
        """Plain data, fit for JSON."""
        return [_to_data(self.counted), _to_data(self.predicted), self.num_softmax_rows, self.num_recomputed_rows]

    @classmethod
    def from_data(cls, data: list[Any]) -> Self:
        """What `to_data` wrote."""
        counted, predicted, num_softmax_rows, num_recomputed_rows = data
        return cls(
            counted=_from_data(counted),
            predicted=_from_data(predicted),
            num_softmax_rows=num_softmax_rows,
            num_recomputed_rows=num_recomputed_rows,
        )


@dataclass(frozen=True, kw_only=True)
class ExchangeTotals:
    """One kind of exchange in one phase, added up over all ranks: a sum among n ranks is n calls of it, one of each."""

    group: str
    operation: str
    phase: Phase
    counted: Sums
    predicted: Sums


def exchange_totals(ranks: Iterable[RankStatistics]) -> tuple[ExchangeTotals, ...]:
    """In the order of group, operation and phase; a kind that was only counted or only predicted is among them."""
    counted: dict[ExchangeKind, Sums] = {}
    predicted: dict[ExchangeKind, Sums] = {}
    for rank in ranks:
        add_totals(counted, rank.counted)
        add_totals(predicted, rank.predicted)
    kinds = sorted({*counted, *predicted}, key=lambda kind: (kind.group, kind.operation, kind.phase.value))
    return tuple(
        ExchangeTotals(
            group=kind.group,
            operation=kind.operation,
            phase=kind.phase,
            counted=counted.get(kind, Sums()),
            predicted=predicted.get(kind, Sums()),
        )
        for kind in kinds
    )


def _to_data(totals: Mapping[ExchangeKind, Sums]) -> list[Any]:
    return [[kind.group, kind.operation, kind.phase.value, *sums] for kind, sums in totals.items()]


def _from_data(rows: list[Any]) -> dict[ExchangeKind, Sums]:
    return {ExchangeKind(group, operation, Phase(phase)): Sums(*sums) for group, operation, phase, *sums in rows}
