"""What `headrace tune` has measured, as tables for people: one function for each section of what is kept."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from headrace.cli.terminal import aligned, format_ms
from headrace.engine.softmax import DEFAULT_SCHEME
from headrace.kernels.attention_tuning import ATTENTION, AttentionShape, AttentionTimes, TunedAttention
from headrace.kernels.mixture_tuning import MIXTURE, MixtureShape, TunedMixture
from headrace.kernels.prefill_tuning import PREFILL, PrefillArm, TunedPrefill, explain_prefill
from headrace.kernels.tuning import LINEAR, LinearArm, LinearShape, TunedShape


def _linear(found: Mapping[LinearShape, TunedShape]) -> Iterator[str]:
    rows = [("[N, K], format", "M1", "M2", *(f"{arm.value} at 1 / 8 / 64" for arm in LinearArm))]
    for shape, result in found.items():
        points = result.inflections
        times = (
            " / ".join(format_ms(result.times[arm].get(m)) for m in (1, 8, 64)).replace(" ms", "") for arm in LinearArm
        )
        rows.append((str(shape), str(points.flat_gemm_from), str(points.gemm_from), *times))
    yield from aligned(rows)
    yield ""
    yield "GEMV below M1 rows, flat GEMM from M1 and below M2, GEMM from M2. Times in ms; - was given up as hopeless."
    if any(result.tiles for result in found.values()):
        yield ""
        yield from aligned([("tiles", *(arm.value for arm in LinearArm)), *map(_tiles_row, found.items())])


def _tiles_row(item: tuple[LinearShape, TunedShape]) -> tuple[str, ...]:
    shape, result = item
    return str(shape), *(str(result.tiles.get(arm, "of the library")) for arm in LinearArm)


def _attention(found: Mapping[AttentionShape, TunedAttention]) -> Iterator[str]:
    for shape, tuned in found.items():
        yield from _attention_times(f"attention, {shape}", tuned.times)
        for num_seqs, times in tuned.batches.items():
            yield ""
            yield from _attention_times(f"the same, {num_seqs} sequences", times)
        yield ""
        usual = tuned.choice([DEFAULT_SCHEME])
        yield f"Used from now on: {usual}. With --softmax measured: {tuned.choice([c.scheme for c in tuned.times])}"
        yield "(asynchronized needs a calibration too). Pieces change no result; schemes round differently."


def _attention_times(title: str, times: AttentionTimes) -> Iterator[str]:
    contexts = list(dict.fromkeys(n for seconds in times.values() for n in seconds))
    rows = [(title, *(f"{n} tokens" for n in contexts))]
    for choice, seconds in times.items():
        rows.append((str(choice), *(f"{seconds[n] * 1e6:.0f} us" for n in contexts)))
    yield from aligned(rows)


def _prefill(found: Mapping[AttentionShape, TunedPrefill]) -> Iterator[str]:
    for shape, tuned in found.items():
        rows = [(f"prompts of {shape}", *(arm.value for arm in PrefillArm))]
        for step in tuned.times[PrefillArm.KERNEL]:
            rows.append((f"{step} tokens", *(f"{tuned.times[arm][step] * 1e6:.0f} us" for arm in PrefillArm)))
        yield from aligned(rows)
        yield ""
        yield f"Used from now on: {explain_prefill(tuned)}. The library rounds differently."


def _mixture(found: Mapping[MixtureShape, TunedMixture]) -> Iterator[str]:
    for tuned in found.values():
        rows = [("mixture of experts", "tiles", "time in ms", "with the default")]
        for launch, seconds in tuned.times.items():
            tiles, default_s = tuned.tiles[launch], next(iter(seconds.values()))
            rows.append((str(launch), str(tiles), format_ms(seconds[tiles]), format_ms(default_s)))
        yield from aligned(rows)


TABLES: Mapping[str, Callable[[Mapping[Any, Any]], Iterator[str]]] = {
    LINEAR.name: _linear,
    ATTENTION.name: _attention,
    PREFILL.name: _prefill,
    MIXTURE.name: _mixture,
}
