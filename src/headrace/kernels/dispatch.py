"""Which implementation runs each op, and why. The only file that reaches an implementation."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum

from headrace.errors import BackendUnavailable, ConfigError, nearest_name
from headrace.kernels import ops, reference

KERNELS_VARIABLE = "HEADRACE_KERNELS"


class KernelChoice(Enum):
    AUTO = "auto"
    REFERENCE = "reference"
    CPU = "cpu"
    TRITON = "triton"


@dataclass(frozen=True, kw_only=True)
class OpChoice:
    """One row of `explain()`."""

    op: str
    implementation: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class Kernels:
    """The ops a model runs on, chosen once. `explain()` says which implementation each one is, and why."""

    linear: ops.LinearOp
    embedding: ops.EmbeddingOp
    rms_norm: ops.RmsNormOp
    layer_norm: ops.LayerNormOp
    rotary_: ops.RotaryOp
    store_kv_: ops.StoreKvOp
    attention: ops.AttentionOp
    activation: ops.ActivationOp
    gated_activation: ops.ActivationOp
    route_experts: ops.RouteOp
    quantize_rows: ops.QuantizeRowsOp
    make_weight_builder: ops.WeightBuilderOp
    choices: tuple[OpChoice, ...]

    def explain(self) -> tuple[OpChoice, ...]:
        return self.choices


def resolve_kernels(choice: KernelChoice) -> Kernels:
    """The ops for a choice.

    Raises:
        BackendUnavailable: an implementation asked for by name that this build does not have.
    """
    match choice:
        case KernelChoice.AUTO:
            return _reference_kernels("auto: the only implementation in this build")
        case KernelChoice.REFERENCE:
            return _reference_kernels(f"asked for by {KERNELS_VARIABLE}=reference")
        case KernelChoice.CPU | KernelChoice.TRITON:
            raise BackendUnavailable(
                f"{KERNELS_VARIABLE}={choice.value}: this build has no {choice.value} kernels; allowed: auto, reference"
            )


def kernel_choice_from(environ: Mapping[str, str] = os.environ) -> KernelChoice:
    """Read HEADRACE_KERNELS, the only environment variable of Headrace's own.

    Raises:
        ConfigError: a value that names no implementation.
    """
    value = environ.get(KERNELS_VARIABLE, KernelChoice.AUTO.value)
    allowed = [choice.value for choice in KernelChoice]
    if value not in allowed:
        raise ConfigError(f"{KERNELS_VARIABLE} is '{value}'; {nearest_name(value, allowed)}")
    return KernelChoice(value)


def _reference_kernels(reason: str) -> Kernels:
    implementations = {
        "linear": reference.linear,
        "embedding": reference.embedding,
        "rms_norm": reference.rms_norm,
        "layer_norm": reference.layer_norm,
        "rotary_": reference.rotary_,
        "store_kv_": reference.store_kv_,
        "attention": reference.attention,
        "activation": reference.activation,
        "gated_activation": reference.gated_activation,
        "route_experts": reference.route_experts,
        "quantize_rows": reference.quantize_rows,
        "make_weight_builder": reference.make_weight_builder,
    }
    choices = tuple(OpChoice(op=op, implementation="reference", reason=reason) for op in implementations)
    return Kernels(**implementations, choices=choices)  # type: ignore[arg-type]
