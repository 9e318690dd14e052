"""`headrace bench ablation`: what each idea of FlashDecoding++ is worth on this machine, for this model."""

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from headrace.cli.bench_options import (
    ProtocolDefaults,
    add_protocol_options,
    check_left_out,
    check_positive,
    resolve_settings,
)
from headrace.cli.environment import machine, versions
from headrace.cli.model_options import add_model_options, loading_config
from headrace.cli.progress_line import progress_line
from headrace.cli.terminal import aligned, format_rate, is_watched
from headrace.config import EngineConfig
from headrace.demo_model import DEMO
from headrace.errors import ConfigError

if TYPE_CHECKING:
    from headrace.bench.ablation import Switchboard
    from headrace.bench.ablation_variants import Variant
    from headrace.bench.model import BenchSettings, ModelSpeed
    from headrace.kernels import SoftmaxCounts

_DEFAULTS = ProtocolDefaults(decode_tokens=4, context_lens=(512, 4096), batch_sizes=(1, 4, 8, 16), rounds=16)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = (
        "All three ideas on is the baseline: asynchronized softmax in every layer, flat GEMM, and the points between\n"
        "GEMV, flat GEMM and GEMM as measured for this model and machine. Then one of them at a time is switched off\n"
        "in the same loaded model, and one at a time is on alone, beside a baseline without any (log-sum-exp softmax,\n"
        "GEMM for every M). Variants take turns of a few steps; each figure is of the fastest step of all, in\n"
        "tokens/s, and in brackets its ratio to the baseline: the idea wins below 1 where it is off, above 1 where it\n"
        "is on alone. The baseline with all is measured twice, to show what is noise. Layers that a calibration keeps\n"
        "synchronized are forced; how many rows were computed again is part of the result."
    )
    add_protocol_options(parser, _DEFAULTS)
    add_model_options(parser)


def run(args: argparse.Namespace) -> int:
    _check(args)
    is_silent = args.json or args.quiet
    config = loading_config(args, show_progress=is_watched() and not is_silent)
    # From here on torch is needed.
    from headrace.bench.ablation import WARM_UP_STEPS, load_switchboard, measure_ablation
    from headrace.bench.ablation_variants import VARIANTS

    switchboard = load_switchboard(config)
    settings, remarks = resolve_settings(
        args, _DEFAULTS, switchboard.model.plan, num_turns=len(VARIANTS), num_untimed_steps=WARM_UP_STEPS
    )
    with progress_line(is_shown=not is_silent) as on_start:
        speeds = measure_ablation(switchboard, settings, on_start)
    remarks += _softmax_remarks(switchboard)
    if args.json:
        print(json.dumps(_json(args, switchboard, settings, speeds, remarks), allow_nan=False))
    else:
        print("\n".join(_table(args, switchboard, speeds, remarks)))
    return 0


def _check(args: argparse.Namespace) -> None:
    check_positive(args)
    defaults = {"softmax": EngineConfig.softmax.value, "dataflow": EngineConfig.dataflow.value}
    check_left_out(args, defaults, "the ablation switches it itself")
    if args.context_lens == [] and args.batch_sizes == []:
        raise ConfigError("--context-lens and --batch-sizes are both empty; there is nothing to measure")


def _softmax_remarks(switchboard: "Switchboard") -> list[str]:
    forced, num_layers = switchboard.asynchronized, switchboard.model.config.num_hidden_layers
    if forced.num_layers_off is None:
        return ["asynchronized softmax subtracts 0: the model has no calibration (`headrace calibrate` makes one)"]
    if forced.num_layers_off:
        return [f"the model's calibration keeps {forced.num_layers_off} of {num_layers} layers synchronized; forced"]
    return []


def _figures(speed: "ModelSpeed") -> dict[tuple[str, int], float]:
    """tokens/s by what was measured and its size."""
    return {("context", n): 1 / s for n, s in speed.decode_step_s.items()} | {
        ("batch", n): n / s for n, s in speed.batch_step_s.items()
    }


def _table(
    args: argparse.Namespace,
    switchboard: "Switchboard",
    speeds: "Mapping[str, ModelSpeed]",
    remarks: list[str],
) -> Iterator[str]:
    from headrace.bench.ablation_variants import VARIANTS

    yield "decode, tokens/s (ratio to all three on)"
    off = [variant for variant in VARIANTS if not variant.is_alone]
    yield from aligned(_rows(off, speeds, ("switched off", "instead")), num_left=2)
    yield ""
    yield "decode, tokens/s (ratio to none of them on)"
    alone = [variant for variant in VARIANTS if variant.is_alone]
    yield from aligned(_rows(alone, speeds, ("alone on", "which makes")), num_left=2)
    yield ""
    yield from aligned(list(_background(args, switchboard, remarks)), num_left=2)


def _rows(
    variants: "Sequence[Variant]", speeds: "Mapping[str, ModelSpeed]", heads: tuple[str, str]
) -> list[tuple[str, ...]]:
    """A table's, its head first."""
    from headrace.engine.softmax import DEFAULT_SCHEME

    figures = _figures(speeds[variants[0].key])
    rows = [(*heads, *(f"batch of {n}" if kind == "batch" else f"from {n}" for kind, n in figures))]
    for variant in variants:
        note = " (the default)" if variant.softmax is DEFAULT_SCHEME and not variant.is_alone else ""
        baseline = _figures(speeds[variant.baseline.key])
        cells = (
            format_rate(rate) + ("" if variant is variant.baseline else f" ({rate / baseline[figure]:.2f})")
            for figure, rate in _figures(speeds[variant.key]).items()
        )
        rows.append((variant.idea or "nothing", variant.label + note, *cells))
    return rows


def _background(args: argparse.Namespace, switchboard: "Switchboard", remarks: list[str]) -> Iterator[tuple[str, str]]:
    # From here on torch is needed.
    from headrace.bench.machine import device_name

    model = switchboard.model
    yield "model", f"{args.model or DEMO}, linear {model.formats.linear.value}, cache {model.kv_cache_format.value}"
    device = model.kernels.device
    threads = f", {model.plan.num_threads} threads" if device.type == "cpu" else ""
    yield "machine", device_name(device) + threads
    yield "recomputed", _explain(switchboard.counts())
    for shape, points in switchboard.inflections.items():
        yield "measured", f"{shape}: {points}"
    for remark in remarks:
        yield "note", remark


def _explain(counts: "SoftmaxCounts") -> str:
    share = counts.num_recomputed_rows / max(1, counts.num_rows)
    return f"{counts.num_recomputed_rows} of {counts.num_rows} rows of the asynchronized softmax ({share:.2%})"


def _json(
    args: argparse.Namespace,
    switchboard: "Switchboard",
    settings: "BenchSettings",
    speeds: "Mapping[str, ModelSpeed]",
    remarks: list[str],
) -> dict[str, Any]:
    from headrace.bench.ablation_variants import BASELINE, NONE, VARIANTS
    from headrace.engine.softmax import DEFAULT_SCHEME

    model, counts = switchboard.model, switchboard.counts()
    variants = []
    for variant in VARIANTS:
        rates = _figures(speeds[variant.key])
        named: dict[str, Any] = {f"decode_from_{n}": round(r, 3) for (kind, n), r in rates.items() if kind == "context"}
        named["batched_decode"] = {str(n): round(r, 3) for (kind, n), r in rates.items() if kind == "batch"}
        switched = {"alone_on" if variant.is_alone else "switched_off": variant.idea}
        variants.append({"key": variant.key, **switched, "label": variant.label, **named})
        for baseline in (BASELINE, NONE) if variant.is_alone else (BASELINE,):
            base = _figures(speeds[baseline.key])
            ratios = {f"{kind}_{n}": round(r / base[kind, n], 4) for (kind, n), r in rates.items()}
            variants[-1][f"ratio_to_{baseline.key}"] = ratios
    return {
        "model": args.model or DEMO,
        "threads": model.plan.num_threads,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "formats": {"linear": model.formats.linear.value, "kv_cache": model.kv_cache_format.value},
        "variants": variants,
        "default_softmax": DEFAULT_SCHEME.value,
        "asynchronized": asdict(counts) | {"num_layers_off": switchboard.asynchronized.num_layers_off},
        "inflections": [{"shape": str(shape), **asdict(points)} for shape, points in switchboard.inflections.items()],
        "protocol": {name: value for name, value in asdict(settings).items() if name != "prefill_tokens"},
        "machine": machine(args.num_threads),
        "versions": versions(),
        "remarks": remarks,
    }
