"""`headrace bench ablation`: what each idea of FlashDecoding++ is worth on this machine, for this model."""

import argparse
import json
from collections.abc import Iterator, Mapping
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
    from headrace.bench.model import BenchSettings, ModelSpeed
    from headrace.kernels import SoftmaxCounts

_DEFAULTS = ProtocolDefaults(decode_tokens=4, context_lens=(512, 4096), batch_sizes=(1, 4, 8, 16), rounds=16)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = (
        "All three ideas on is the baseline: asynchronized softmax in every layer, flat GEMM, and the points between\n"
        "GEMV, flat GEMM and GEMM as measured for this model and machine. Then one of them at a time is switched off\n"
        "in the same loaded model. Variants take turns of a few steps; each figure is of the fastest step of all, in\n"
        "tokens/s, and in brackets its ratio to the baseline: below 1, the idea wins. The baseline is measured twice,\n"
        "to show what is noise. Layers that a calibration keeps synchronized are forced; how many rows were computed\n"
        "again is part of the result."
    )
    add_protocol_options(parser, _DEFAULTS)
    add_model_options(parser)


def run(args: argparse.Namespace) -> int:
    _check(args)
    is_silent = args.json or args.quiet
    config = loading_config(args, show_progress=is_watched() and not is_silent)
    # From here on torch is needed.
    from headrace.bench.ablation import VARIANTS, WARM_UP_STEPS, load_switchboard, measure_ablation

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
    from headrace.bench.ablation import BASELINE, VARIANTS
    from headrace.engine.softmax import DEFAULT_SCHEME

    baseline = _figures(speeds[BASELINE.key])
    heads = [f"batch of {n}" if kind == "batch" else f"from {n}" for kind, n in baseline]
    rows = [("switched off", "instead", *heads)]
    for variant in VARIANTS:
        is_baseline = variant is BASELINE
        note = " (the default)" if variant.softmax is DEFAULT_SCHEME else ""
        rates = _figures(speeds[variant.key])
        cells = (
            format_rate(rate) + ("" if is_baseline else f" ({rate / baseline[figure]:.2f})")
            for figure, rate in rates.items()
        )
        rows.append((variant.idea or "nothing", variant.label + note, *cells))
    yield "decode, tokens/s (ratio to all three on)"
    yield from aligned(rows, num_left=2)
    yield ""
    yield from aligned(list(_background(args, switchboard, remarks)), num_left=2)


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
    from headrace.bench.ablation import BASELINE, VARIANTS
    from headrace.engine.softmax import DEFAULT_SCHEME

    model, counts, baseline = switchboard.model, switchboard.counts(), _figures(speeds[BASELINE.key])
    variants = []
    for variant in VARIANTS:
        rates = _figures(speeds[variant.key])
        named: dict[str, Any] = {f"decode_from_{n}": round(r, 3) for (kind, n), r in rates.items() if kind == "context"}
        named["batched_decode"] = {str(n): round(r, 3) for (kind, n), r in rates.items() if kind == "batch"}
        ratios = {f"{kind}_{n}": round(r / baseline[kind, n], 4) for (kind, n), r in rates.items()}
        variants.append({"key": variant.key, "switched_off": variant.idea, "label": variant.label, **named})
        variants[-1]["ratio_to_all"] = ratios
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
