"""What was measured, what failed and what was left out; as JSON, so that one run can go on with another's."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

Label = str | int
Key = tuple[str, tuple[tuple[str, Label], ...]]


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One measured time.

    group: the table it stands in; labels: its place there.
    seconds: the best of all rounds; slowest_s: the slowest round's best, so that the two show the noise. Infinite where
        nothing was timed: a peer whose result is not the reference's does something else, and its time says nothing.
    num_bytes: to be read and written at least; num_ops: multiplies and adds; num_tokens: that went through.
    error: of what was computed, the norm of its difference to a float32 reference over the reference's; None where it
        was not compared. tolerance: what it must stay below.
    is_captured: timed in a graph.
    """

    group: str
    labels: Mapping[str, Label]
    seconds: float
    slowest_s: float | None = None
    num_bytes: int = 0
    num_ops: int = 0
    num_tokens: int = 0
    error: float | None = None
    tolerance: float | None = None
    is_captured: bool = False
    note: str = ""

    @property
    def key(self) -> Key:
        return self.group, tuple(sorted(self.labels.items()))

    @property
    def is_timed(self) -> bool:
        return self.seconds < float("inf")

    @property
    def is_right(self) -> bool:
        """An error that is no number is none to accept."""
        return self.error is None or (self.tolerance is not None and self.error <= self.tolerance)

    @property
    def bytes_per_s(self) -> float:
        return self.num_bytes / self.seconds

    @property
    def ops_per_s(self) -> float:
        return self.num_ops / self.seconds


@dataclass(frozen=True, kw_only=True)
class Trouble:
    """A unit, or a part of one, that gave no figure. is_failure: it was tried."""

    unit: str
    message: str
    is_failure: bool = True
    details: str = ""


@dataclass(kw_only=True)
class Results:
    """facts: of the machine and its software; tests: by suite."""

    facts: dict[str, Any] = field(default_factory=dict)
    tests: dict[str, dict[str, Any]] = field(default_factory=dict)
    figures: dict[Key, Figure] = field(default_factory=dict)
    troubles: dict[str, Trouble] = field(default_factory=dict)
    done: list[str] = field(default_factory=list)

    def add(self, entry: Mapping[str, Any]) -> None:
        """One line of a run: what came later replaces what came earlier, and a unit that is done has no trouble."""
        match entry["kind"]:
            case "facts":
                self.facts |= entry["facts"]
            case "tests":
                self.tests |= entry["tests"]
            case "figure":
                figure = Figure(**entry["figure"])
                self.figures[figure.key] = figure
            case "trouble":
                trouble = Trouble(**entry["trouble"])
                self.troubles[trouble.unit] = trouble
            case "done":
                self.done.append(entry["unit"])
            case "begin":
                for unit in [u for u in self.troubles if u.partition(": ")[0] == entry["unit"]]:
                    del self.troubles[unit]

    def of(self, group: str, **labels: Label) -> list[Figure]:
        """Those of a group that have all of these labels."""
        return [f for f in self.figures.values() if f.group == group and labels.items() <= f.labels.items()]

    def one(self, group: str, **labels: Label) -> Figure | None:
        found = self.of(group, **labels)
        return found[0] if len(found) == 1 else None

    def to_json(self) -> dict[str, Any]:
        return {
            "facts": self.facts,
            "tests": self.tests,
            "figures": [asdict(figure) for figure in self.figures.values()],
            "troubles": [asdict(trouble) for trouble in self.troubles.values()],
            "done": self.done,
        }


def entries_of(data: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """What `Results.to_json` made, as lines again."""
    yield {"kind": "facts", "facts": data["facts"]}
    yield {"kind": "tests", "tests": data["tests"]}
    yield from ({"kind": "figure", "figure": figure} for figure in data["figures"])
    yield from ({"kind": "trouble", "trouble": trouble} for trouble in data["troubles"])
    yield from ({"kind": "done", "unit": unit} for unit in data["done"])


def merged(files: Iterable[Path]) -> Results:
    """Later files win, figure by figure."""
    results = Results()
    for file in files:
        for entry in entries_of(json.loads(file.read_text())):
            if entry["kind"] == "done":
                results.add({"kind": "begin", "unit": entry["unit"]})
            results.add(entry)
    return results


def figure_entry(figure: Figure) -> dict[str, Any]:
    return {"kind": "figure", "figure": asdict(figure)}


def trouble_entry(trouble: Trouble) -> dict[str, Any]:
    return {"kind": "trouble", "trouble": asdict(trouble)}
