"""`headrace tune`: measure which implementations suit a model on this machine, and remember them."""

import argparse
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headrace.cli.options import add_model_options, make_llm
from headrace.cli.terminal import aligned, format_ms, is_watched, note
from headrace.errors import ConfigError

if TYPE_CHECKING:
    from headrace.kernels.attention_tuning import AttentionShape, TunedAttention
    from headrace.kernels.mixture_tuning import TunedMixture
    from headrace.kernels.prefill_tuning import TunedPrefill
    from headrace.kernels.tuning import LinearShape, TunedShape

_ROUNDS = 12
_ATTENTION_ROUNDS = 8
"""For each round of linear layers: a call is so short that noise is large beside it."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = (
        "GEMV takes one row at a time, flat GEMM all rows at each pass over the weights, GEMM blocks of rows. For\n"
        "each shape of the model all three are timed over M, the number of rows, in turn and several times; the best\n"
        "times give the two points where one is overtaken by the next. Attention of one new token is timed over the\n"
        "length of the context, by softmax scheme and by the number of pieces that threads share. On a GPU each\n"
        "implementation first finds the best of its tiles, launches are timed in a CUDA graph, mixtures of experts\n"
        "are timed for few and many tokens with each of the tiles their launches can take, and attention of prompts\n"
        "as the kernel and as the library compute it. All is kept in the user's cache for this CPU and number of\n"
        "threads, or this GPU, and this build of the kernels, and later starts use it. Close other programs first."
    )
    parser.add_argument(
        "--rounds",
        type=int,
        default=_ROUNDS,
        metavar="N",
        help="rounds, of which the best counts (default: %(default)s)",
    )
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw time against M, as .png, .svg or .pdf")
    parser.add_argument("--json", action="store_true", help="print one JSON object, and nothing else")
    add_model_options(parser, with_ranks=True)


def run(args: argparse.Namespace) -> int:
    if args.rounds < 1:
        raise ConfigError(f"--rounds is {args.rounds}; it must be at least 1")
    if args.plot is not None:
        from headrace.cli.plots import check_can_plot

        check_can_plot(args.plot)
    # From here on torch is needed.
    from headrace.engine.tune import FULL_ROWS, keep, measure_shapes
    from headrace.engine.tune_attention import attention_shape, contexts_of, measure_attention
    from headrace.engine.tune_mixture import measure_mixture
    from headrace.engine.tune_prefill import measure_prefill
    from headrace.kernels.attention_tuning import attention_to_json, keep_attention
    from headrace.kernels.mixture_tuning import keep_mixture, mixture_to_json
    from headrace.kernels.prefill_tuning import keep_prefill, prefill_to_json
    from headrace.kernels.tuning import TuningCache

    args.dataflow = "default"  # nothing is looked up or measured but here
    show_progress = is_watched() and not args.json
    model = make_llm(args, show_progress=show_progress, require_tokenizer=False).engine.model
    if model.kernels.tuning_key is None:
        raise ConfigError("there is nothing to tune: the reference has one implementation of linear layers only")
    cache = TuningCache(model.kernels.tuning_key(model.plan.num_threads))
    shapes = model.linear_weights.by_shape
    tuned = dict(
        measure_shapes(
            model.kernels,
            model.linear_weights,
            shapes,
            rows=FULL_ROWS,
            rounds=args.rounds,
            show_progress=show_progress,
            compares_tiles=True,
        )
    )
    is_kept = keep(cache, tuned)
    attention, tuned_attention = attention_shape(model.shape, model.kv_cache_format), None
    if len(tuned) == len(shapes):  # else Ctrl-C has ended the measurement
        tuned_attention = measure_attention(
            model.kernels,
            attention,
            contexts=contexts_of(model.plan.max_model_len),
            num_threads=model.plan.num_threads,
            num_rounds=_ATTENTION_ROUNDS * args.rounds,
            show_progress=show_progress,
        )
    tuned_prefill = None
    if tuned_attention is not None:
        is_kept = keep_attention(cache, attention, tuned_attention) and is_kept
        tuned_prefill = measure_prefill(
            model.kernels,
            attention,
            max_model_len=model.plan.max_model_len,
            num_rounds=args.rounds,
            show_progress=show_progress,
        )
    if tuned_prefill is not None:
        is_kept = keep_prefill(cache, attention, tuned_prefill) and is_kept
    mixture = model.mixtures if tuned_attention is not None and model.kernels.has_expert_tiles else None
    tuned_mixture = None
    if mixture is not None:
        tuned_mixture = measure_mixture(model.kernels, mixture, num_rounds=args.rounds, show_progress=show_progress)
    if mixture is not None and tuned_mixture is not None:
        is_kept = keep_mixture(cache, mixture.shape, tuned_mixture) and is_kept
    if args.plot is not None:
        from headrace.cli.tune_plot import plot

        plot(tuned, args.plot)
    if args.json:
        report = {
            "file": str(cache.file) if is_kept else None,
            "linear": list(map(_json, tuned.items())),
            "attention": None if tuned_attention is None else attention_to_json(attention, tuned_attention),
            "prefill": None if tuned_prefill is None else prefill_to_json(attention, tuned_prefill),
            "mixture": mixture_to_json(mixture.shape, tuned_mixture) if mixture and tuned_mixture else None,
        }
        print(json.dumps(report))
    else:
        tables = (
            _table(tuned),
            _attention_table(attention, tuned_attention),
            _prefill_table(attention, tuned_prefill),
            _mixture_table(tuned_mixture),
        )
        print("\n".join(chain.from_iterable(tables)))
        note(f"kept in {cache.file}" if is_kept else f"could not be kept: {cache.file} cannot be written")
        if len(tuned) < len(shapes):
            note(f"stopped after {len(tuned)} of {len(shapes)} shapes")
        elif tuned_attention is None:
            note("stopped before attention was measured")
    return 0


def _table(tuned: "Mapping[LinearShape, TunedShape]") -> Iterator[str]:
    from headrace.kernels.tuning import LinearArm

    rows = [("[N, K], format", "M1", "M2", *(f"{arm.value} at 1 / 8 / 64" for arm in LinearArm))]
    for shape, result in tuned.items():
        points = result.inflections
        times = (
            " / ".join(format_ms(result.times[arm].get(m)) for m in (1, 8, 64)).replace(" ms", "") for arm in LinearArm
        )
        rows.append((str(shape), str(points.flat_gemm_from), str(points.gemm_from), *times))
    yield from aligned(rows)
    yield ""
    yield "GEMV below M1 rows, flat GEMM from M1 and below M2, GEMM from M2. Times in ms; - was given up as hopeless."
    if any(result.tiles for result in tuned.values()):
        yield ""
        yield from aligned([("tiles", *(arm.value for arm in LinearArm)), *map(_tiles_row, tuned.items())])


def _tiles_row(item: "tuple[LinearShape, TunedShape]") -> tuple[str, ...]:
    from headrace.kernels.tuning import LinearArm

    shape, result = item
    return str(shape), *(str(result.tiles.get(arm, "of the library")) for arm in LinearArm)


def _attention_table(shape: "AttentionShape", tuned: "TunedAttention | None") -> Iterator[str]:
    if tuned is None:
        return
    yield ""
    from headrace.engine.softmax import DEFAULT_SCHEME

    contexts = list(dict.fromkeys(n for seconds in tuned.times.values() for n in seconds))
    rows = [(f"attention, {shape}", *(f"{n} tokens" for n in contexts))]
    for choice, seconds in tuned.times.items():
        rows.append((str(choice), *(f"{seconds[n] * 1e6:.0f} us" for n in contexts)))
    yield from aligned(rows)
    yield ""
    usual = tuned.choice([DEFAULT_SCHEME])
    yield f"Used from now on: {usual}. With --softmax measured: {tuned.choice([c.scheme for c in tuned.times])}"
    yield "(asynchronized needs a calibration too). Pieces change no result; schemes round differently."


def _prefill_table(shape: "AttentionShape", tuned: "TunedPrefill | None") -> Iterator[str]:
    if tuned is None:
        return
    yield ""
    from headrace.kernels.prefill_tuning import PrefillArm, explain_prefill

    rows = [(f"prompts of {shape}", *(arm.value for arm in PrefillArm))]
    for step in tuned.times[PrefillArm.KERNEL]:
        rows.append((f"{step} tokens", *(f"{tuned.times[arm][step] * 1e6:.0f} us" for arm in PrefillArm)))
    yield from aligned(rows)
    yield ""
    yield f"Used from now on: {explain_prefill(tuned)}. The library rounds differently."


def _mixture_table(tuned: "TunedMixture | None") -> Iterator[str]:
    if tuned is None:
        return
    rows = [("mixture of experts", "tiles", "time in ms", "with the default")]
    for launch, seconds in tuned.times.items():
        tiles, default_s = tuned.tiles[launch], next(iter(seconds.values()))
        rows.append((str(launch), str(tiles), format_ms(seconds[tiles]), format_ms(default_s)))
    yield ""
    yield from aligned(rows)


def _json(item: "tuple[LinearShape, TunedShape]") -> dict[str, Any]:
    shape, result = item
    return {
        "weight_format": shape.weight_format.value,
        "out_features": shape.out_features,
        "in_features": shape.in_features,
        "flat_gemm_from": result.inflections.flat_gemm_from,
        "gemm_from": result.inflections.gemm_from,
        "seconds": {arm.value: dict(seconds) for arm, seconds in result.times.items()},
        "tiles": {arm.value: asdict(tiles) for arm, tiles in result.tiles.items()},
    }
