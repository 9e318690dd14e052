"""What the GPU backend is to reach, and what of it was reached; every figure against limits of the same run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from scripts.gpu_check.figures import Figure, Results

FLAT_ROWS = 16
"""The rows of a GEMV and of a flat GEMM: up to 16."""

LONG_CONTEXT = 4096
_DENSE = ("bfloat16", "float32")
"""Weights that are not quantized; float32 in a dry run alone."""

_HEADRACE, _EAGER, _COMPILED = "headrace", ("transformers eager", "transformers sdpa"), "transformers compiled"


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """value: what was measured, at its worst or best as the target says; None where it was not."""

    name: str
    needed: str
    value: str | None = None
    where: str = ""
    is_met: bool | None = None


def verdicts(results: Results) -> list[Verdict]:
    return [
        _right(results),
        _worst(
            f"linear layers, bfloat16, M = 1 to {FLAT_ROWS}: of copy bandwidth",
            0.85,
            _shares(results, _linears(results)),
        ),
        _worst(
            f"decode attention, {LONG_CONTEXT} tokens and more: of copy bandwidth",
            0.80,
            _shares(results, _long_contexts(results)),
        ),
        _worst("batch 1 decode, bfloat16: of reading the weights", 0.80, _decode_shares(results)),
        _against(results, "batch 1 decode: times transformers, op by op", 4.86, _EAGER),
        _against(results, "batch 1 decode: times transformers, compiled", 1.0, (_COMPILED,)),
        *_prefill(results),
    ]


def copy_bytes_per_s(results: Results) -> float | None:
    """What targets are compared with: a copy, where bytes read and bytes written count."""
    found = results.one("limit", name="copy")
    return None if found is None else found.bytes_per_s


def _right(results: Results) -> Verdict:
    """Without the peers that were not timed: that they are wrong is for the tables to say."""
    compared = [figure for figure in results.figures.values() if figure.error is not None and figure.is_timed]
    wrong = [figure for figure in compared if not figure.is_right]
    name = "outputs compared with a float32 reference: wrong ones"
    if not compared:
        return Verdict(name=name, needed="0")
    where = _place(wrong[0]) if wrong else f"of {len(compared)}"
    return Verdict(name=name, needed="0", value=str(len(wrong)), where=where, is_met=not wrong)


def _linears(results: Results) -> list[Figure]:
    found = _dense(results.of("linear", arm="chosen"))
    return [figure for figure in found if int(figure.labels["rows"]) <= FLAT_ROWS]


def _dense(figures: Sequence[Figure]) -> list[Figure]:
    return [figure for figure in figures if figure.labels["format"] in _DENSE]


def _long_contexts(results: Results) -> list[Figure]:
    """The scheme that `auto` takes."""
    found = results.of("decode attention", by="synchronized")
    return [figure for figure in found if int(figure.labels["context"]) >= LONG_CONTEXT]


def _shares(results: Results, figures: Sequence[Figure]) -> list[tuple[float, str]]:
    bandwidth = copy_bytes_per_s(results)
    return [] if bandwidth is None else [(f.bytes_per_s / bandwidth, _place(f)) for f in figures]


def _decode_shares(results: Results) -> list[tuple[float, str]]:
    return _shares(results, _dense(results.of("decode", by=_HEADRACE, batch=1)))


def _worst(name: str, needed: float, found: Sequence[tuple[float, str]]) -> Verdict:
    if not found:
        return Verdict(name=name, needed=f"{needed:.0%}")
    value, where = min(found)
    return Verdict(name=name, needed=f"{needed:.0%}", value=f"{value:.0%}", where=where, is_met=value >= needed)


def _against(results: Results, name: str, needed: float, peers: Sequence[str]) -> Verdict:
    """The lowest ratio to the fastest of the peers."""
    ours = {f.labels["context"]: f for f in _dense(results.of("decode", by=_HEADRACE, batch=1))}
    ratios = list(_ratios(ours, lambda n: [results.one("decode", by=p, batch=1, context=n) for p in peers]))
    if not ratios:
        return Verdict(name=name, needed=f"{needed:g}")
    value, where = min(ratios)
    return Verdict(name=name, needed=f"{needed:g}", value=f"{value:.2f}", where=where, is_met=value >= needed)


def _prefill(results: Results) -> Iterator[Verdict]:
    ours = {f.labels["tokens"]: f for f in _dense(results.of("prefill", by=_HEADRACE))}
    ratios = list(_ratios(ours, lambda n: [results.one("prefill", by=p, tokens=n) for p in _EAGER]))
    for name, needed, pick in (("at the best length", 1.4, max), ("at the worst length", 1.0, min)):
        title = f"prefill: times transformers, op by op, {name}"
        if not ratios:
            yield Verdict(name=title, needed=f"{needed:g}")
            continue
        value, where = pick(ratios)
        yield Verdict(name=title, needed=f"{needed:g}", value=f"{value:.2f}", where=where, is_met=value >= needed)


def _ratios(
    ours: dict[str | int, Figure], peers_at: Callable[[str | int], list[Figure | None]]
) -> Iterator[tuple[float, str]]:
    for length, figure in ours.items():
        peers = [peer for peer in peers_at(length) if peer is not None and peer.is_timed]
        if peers:
            fastest = min(peers, key=lambda peer: peer.seconds)
            yield fastest.seconds / figure.seconds, f"{length} tokens, {fastest.labels['by']}"


def _place(figure: Figure) -> str:
    return " ".join(str(value) for value in figure.labels.values())
