"""The units of a run, in the order in which they are worth their time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from scripts.gpu_check.context import Context
from scripts.gpu_check.figures import Figure
from scripts.gpu_check.scale import Scale

STAGES = ("limits", "linear", "attention", "model", "peers", "ablation")
"""Beside "tests", which is run by pytest and no unit."""


@dataclass(frozen=True, kw_only=True)
class Unit:
    """limit_s: what takes longer is ended. has_kernels: worth compiling ahead, in several processes."""

    name: str
    stage: str
    limit_s: float
    run: Callable[[Context], Iterator[Figure]]
    has_kernels: bool = False


def all_units(scale: Scale) -> dict[str, Unit]:
    """By name. Imports what measures only here, since that imports torch.

    Attention has more time where FlashInfer is, which may have to compile its kernels with nvcc.
    """
    from scripts.gpu_check import ablation, attention, attention_flashinfer, limits, linears, model, peers

    attention_s = 300 if attention_flashinfer.is_installed(scale) else 120
    units = [
        Unit(name="limits", stage="limits", limit_s=60, run=limits.measure),
        *(
            Unit(
                name=f"linear {weight_format} {layer}",
                stage="linear",
                limit_s=120,
                run=linears.measure(weight_format, layer),
                has_kernels=True,
            )
            for weight_format in scale.formats
            for layer in scale.layers
        ),
        *(
            Unit(
                name=f"attention {heads} {phase}",
                stage="attention",
                limit_s=attention_s,
                run=attention.measure(heads, phase),
                has_kernels=True,
            )
            for phase in ("decode", "prefill", "chunk")
            for heads in scale.heads
        ),
        *(
            Unit(name=f"model {weight_format}", stage="model", limit_s=240, run=model.measure(weight_format))
            for weight_format in scale.model_formats
        ),
        *(
            Unit(name=f"transformers {kind}", stage="peers", limit_s=240, run=peers.measure(kind))
            for kind in ("eager", "sdpa", "compiled")
        ),
        Unit(name="ablation", stage="ablation", limit_s=240, run=ablation.measure),
    ]
    return {unit.name: unit for unit in units}
