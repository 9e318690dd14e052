"""Which softmax and how many pieces suit a model's decode attention, measured over the length of the context and, on a
GPU, for some batches.

Pieces change no bit: kernels split a context at fixed positions and merge the splits in order, whoever computes them. A
scheme rounds differently from another, so that a measurement chooses it only for those who ask for that.
"""

import math
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from headrace.config import KvCacheFormat, SoftmaxScheme
from headrace.kernels.tuning import TIE
from headrace.kernels.tuning_cache import Section


@dataclass(frozen=True, kw_only=True)
class AttentionShape:
    """What decode attention reads for one token: the heads of a layer and how their cache is stored."""

    cache_format: KvCacheFormat
    num_heads: int
    num_kv_heads: int
    head_dim: int

    def __str__(self) -> str:
        return f"{self.num_heads} heads of {self.head_dim} over {self.num_kv_heads}, {self.cache_format.value}"


@dataclass(frozen=True, kw_only=True)
class AttentionChoice:
    """max_pieces: of a context, for several threads, or programs of a GPU's launch; None leaves it to the kernel."""

    scheme: SoftmaxScheme = SoftmaxScheme.SYNCHRONIZED
    max_pieces: int | None = None

    def __str__(self) -> str:
        pieces = "" if self.max_pieces is None else f", contexts in at most {self.max_pieces} pieces"
        return f"{self.scheme.value} softmax{pieces}"


@dataclass(frozen=True, kw_only=True)
class ChosenAttention:
    """max_pieces: as `AttentionChoice` has it, by the least number of sequences of a launch that it is for."""

    scheme: SoftmaxScheme
    max_pieces: Mapping[int, int | None]

    def __str__(self) -> str:
        if len(self.max_pieces) == 1:
            (most,) = self.max_pieces.values()
            return str(AttentionChoice(scheme=self.scheme, max_pieces=most))
        programs = (
            f"{'the default' if most is None else most} from {num_seqs} sequence{'s' if num_seqs > 1 else ''}"
            for num_seqs, most in self.max_pieces.items()
        )
        return f"{self.scheme.value} softmax, programs of a launch: {', '.join(programs)}"


AttentionTimes = Mapping[AttentionChoice, Mapping[int, float]]
"""Seconds by choice and length of the context."""


@dataclass(frozen=True, kw_only=True)
class TunedAttention:
    """What was measured. The choice follows from it, because which schemes a model may use is known later.

    times: of one sequence; batches: of larger numbers of sequences, each of the same length, in ascending order.
    """

    measured_on: str
    times: AttentionTimes
    batches: Mapping[int, AttentionTimes] = field(default_factory=dict)

    def choice(self, schemes: Collection[SoftmaxScheme]) -> ChosenAttention:
        """One sequence decides the scheme for all batches: were it to differ, a row's bits would show its company."""
        single = find_attention_choice(self.times, schemes)
        batches = {n: find_attention_choice(times, [single.scheme]).max_pieces for n, times in self.batches.items()}
        return ChosenAttention(scheme=single.scheme, max_pieces={1: single.max_pieces} | batches)


def find_attention_choice(times: AttentionTimes, schemes: Collection[SoftmaxScheme]) -> AttentionChoice:
    """Of these schemes: the least mean over contexts of log(time of the choice / time of the best).

    Those within log(TIE) of the least are equal, and of equals the first one measured is taken: it is the nearest to
    the default. If none of them was measured, the first is.
    """
    allowed = {choice: seconds for choice, seconds in times.items() if choice.scheme in schemes}
    if not allowed:
        return AttentionChoice(scheme=next(iter(schemes)))
    lengths = set.intersection(*(set(seconds) for seconds in allowed.values()))
    best_s = {n: min(seconds[n] for seconds in allowed.values()) for n in lengths}

    def regret(seconds: Mapping[int, float]) -> float:
        return sum(math.log(seconds[n] / best_s[n]) for n in lengths) / len(lengths)

    regrets = {choice: regret(seconds) for choice, seconds in allowed.items()}
    good = min(regrets.values()) + math.log(TIE)
    return next(choice for choice, found in regrets.items() if found <= good)


def _join(earlier: TunedAttention, tuned: TunedAttention) -> TunedAttention:
    """A model with shorter contexts, or a start with less memory for batches, may have the same heads."""
    batches = {
        n: _join_times(earlier.batches.get(n, {}), tuned.batches.get(n, {}))
        for n in sorted({*earlier.batches, *tuned.batches})
    }
    times = _join_times(earlier.times, tuned.times)
    return TunedAttention(measured_on=tuned.measured_on, times=times, batches=batches)


def _join_times(earlier: AttentionTimes, later: AttentionTimes) -> AttentionTimes:
    return {choice: {**earlier.get(choice, {}), **seconds} for choice, seconds in later.items()} or earlier


def _to_json(shape: AttentionShape, tuned: TunedAttention) -> dict[str, Any]:
    return {
        **asdict(shape),
        "cache_format": shape.cache_format.value,
        "measured_on": tuned.measured_on,
        "times": _times_to_json(tuned.times),
        "batches": {str(n): _times_to_json(times) for n, times in tuned.batches.items()},
    }


def _times_to_json(times: AttentionTimes) -> list[dict[str, Any]]:
    return [
        {
            "scheme": choice.scheme.value,
            "max_pieces": choice.max_pieces,
            "seconds": {str(n): s for n, s in seconds.items()},
        }
        for choice, seconds in times.items()
    ]


def shape_from_json(entry: dict[str, Any]) -> AttentionShape:
    return AttentionShape(
        cache_format=KvCacheFormat(entry["cache_format"]),
        num_heads=int(entry["num_heads"]),
        num_kv_heads=int(entry["num_kv_heads"]),
        head_dim=int(entry["head_dim"]),
    )


def _from_json(entry: dict[str, Any]) -> tuple[AttentionShape, TunedAttention]:
    # Before batches were measured there was no entry for them.
    batches = {int(n): _times_from_json(rows) for n, rows in entry.get("batches", {}).items()}
    times = _times_from_json(entry["times"])
    tuned = TunedAttention(measured_on=str(entry["measured_on"]), times=times, batches=dict(sorted(batches.items())))
    return shape_from_json(entry), tuned


def _times_from_json(rows: list[dict[str, Any]]) -> AttentionTimes:
    times = {}
    for row in rows:
        pieces = None if row["max_pieces"] is None else int(row["max_pieces"])
        choice = AttentionChoice(scheme=SoftmaxScheme(row["scheme"]), max_pieces=pieces)
        times[choice] = {int(n): float(seconds) for n, seconds in row["seconds"].items()}
    return times


ATTENTION = Section(name="attention", to_json=_to_json, from_json=_from_json, join=_join)
