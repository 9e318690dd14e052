"""`headrace info`: what Headrace sees of this machine, and of a model without loading its weights."""

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterator
from typing import Any

from headrace.cli.environment import machine, versions
from headrace.cli.model_options import add_model_options, engine_config
from headrace.cli.terminal import aligned, bold, format_bytes, is_watched
from headrace.config import Device


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON object, and nothing else")
    add_model_options(parser, default="none, only the machine is shown")


def run(args: argparse.Namespace) -> int:
    # From here on torch is needed: kernels are chosen and models are opened with it.
    from headrace.cli.model_info import dataflow_info, model_info
    from headrace.engine.devices import gpu_facts, resolve_device
    from headrace.kernels import kernel_choice_from, resolve_kernels

    choice, gpus = kernel_choice_from(), gpu_facts()
    chosen = resolve_device(Device.parse(args.device), choice, facts=gpus)
    kernels = resolve_kernels(choice, device=chosen.device, batch_invariant=args.batch_invariant)
    facts: dict[str, Any] = {
        "versions": versions(),
        "machine": machine(args.num_threads),
        "device": {"device": str(chosen.device), "reason": chosen.reason, **gpus.versions},
        "gpus": [
            {
                "gpu": f"cuda:{gpu.index}",
                "name": gpu.name,
                "memory_bytes": gpu.memory_bytes,
                "capability": gpu.capability,
                "obstacle": gpu.obstacle or gpus.obstacle,
            }
            for gpu in gpus.gpus
        ],
        "kernels": [
            {"op": choice.op, "implementation": choice.implementation, "reason": choice.reason}
            for choice in kernels.explain()
        ],
    }
    if args.model is not None:
        config = engine_config(args, show_progress=is_watched() and not args.json)
        facts["model"] = model_info(config, kernels)
        if dataflow := dataflow_info(config, kernels):
            facts["dataflow"] = dataflow
    if args.json:
        print(json.dumps(facts, allow_nan=False))
    else:
        print("\n".join(_text(facts | {"kernels": _kernels_text(facts["kernels"])})))
    return 0


def _kernels_text(kernels: list[dict[str, str]]) -> list[dict[str, str]]:
    """One row for all ops that most have in common: two dozen equal lines hide the one that differs."""
    reasons = Counter((kernel["implementation"], kernel["reason"]) for kernel in kernels)
    [((implementation, reason), number)] = reasons.most_common(1)
    others = [kernel for kernel in kernels if (kernel["implementation"], kernel["reason"]) != (implementation, reason)]
    name = f"{'the other' if others else 'all'} {number} ops"
    return [*others, {"op": name, "implementation": implementation, "reason": reason}]


def _text(facts: dict[str, Any]) -> Iterator[str]:
    for name, section in facts.items():
        if not section:
            continue
        yield bold(name, sys.stdout)
        rows = [_cells(row) for row in section] if isinstance(section, list) else list(_rows(section))
        yield from (f"  {line}" for line in aligned(rows, num_left=3))
        yield ""


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    return tuple("" if value is None else _shown(name, value) for name, value in row.items())


def _rows(section: dict[str, Any]) -> Iterator[tuple[str, str]]:
    for name, value in section.items():
        yield name.removesuffix("_bytes").replace("_", " "), _shown(name, value)


def _shown(name: str, value: Any) -> str:
    if value is None:
        return "none"
    if name.endswith("_bytes"):
        return format_bytes(value)
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return f"{value:,}" if isinstance(value, int) else str(value)
