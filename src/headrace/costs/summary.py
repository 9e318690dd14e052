"""Rows of all ranks, put together by kind of exchange."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from headrace.costs.sites import Phase
from headrace.costs.volume import Counted


@dataclass(frozen=True, kw_only=True)
class SummaryRow:
    """One kind of exchange in one phase, at all of its sites and on all ranks.

    kind: attention, mlp, context, embedding, logits, candidates or boundary.
    count: of collectives, each of which all ranks of a group make together, or of messages from rank to rank.
    payload_bytes, wire_bytes: of the rank with the largest wire_bytes (where all are equal, of any); total_wire_bytes:
        of all ranks.
    """

    phase: Phase
    operation: str
    group: str
    kind: str
    algorithm: str
    count: int
    payload_bytes: int
    wire_bytes: int
    total_wire_bytes: int


def site_kind(site: str) -> str:
    """layers.3.mlp is an mlp, boundary.0 a boundary."""
    parts = site.split(".")
    return parts[-1] if parts[0] == "layers" else parts[0]


def summarize(ranks: Sequence[Iterable[Counted]], callers: Mapping[str, int]) -> list[SummaryRow]:
    """In order of phase and first occurrence. What is received is what another rank has sent, and left out.

    callers: by name of a group, how many ranks make one call together (`Layout.callers`).
    """
    places: dict[tuple[Phase, str, str, str, str], list[list[int]]] = {}
    for rank, rows in enumerate(ranks):
        for row in rows:
            if row.operation != "recv" and row.count:
                place = (row.phase, row.operation, row.group, site_kind(row.site), row.algorithm)
                sums = places.setdefault(place, [[0, 0, 0] for _ in ranks])[rank]
                for i, value in enumerate((row.count, row.payload_bytes, row.wire_bytes)):
                    sums[i] += value
    return [
        _row(*place, sums, callers[place[2]])
        for place, sums in sorted(places.items(), key=lambda item: item[0][0] is Phase.DECODE)
    ]


def _row(
    phase: Phase, operation: str, group: str, kind: str, algorithm: str, sums: list[list[int]], num_callers: int
) -> SummaryRow:
    _, payload_bytes, wire_bytes = max(sums, key=lambda of_rank: (of_rank[2], of_rank[1]))
    return SummaryRow(
        phase=phase,
        operation=operation,
        group=group,
        kind=kind,
        algorithm=algorithm,
        count=sum(of_rank[0] for of_rank in sums) // num_callers,
        payload_bytes=payload_bytes,
        wire_bytes=wire_bytes,
        total_wire_bytes=sum(of_rank[2] for of_rank in sums),
    )


def wire_bytes_by_phase(ranks: Sequence[Iterable[Counted]]) -> dict[Phase, int]:
    """On all wires together."""
    totals: defaultdict[Phase, int] = defaultdict(int)
    for rows in ranks:
        for row in rows:
            totals[row.phase] += row.wire_bytes
    return {phase: totals[phase] for phase in Phase}
