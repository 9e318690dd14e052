"""Which implementation runs each op, and why. The only file that reaches an implementation."""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from enum import Enum
from functools import partial
from importlib import import_module
from types import ModuleType
from typing import Any

import torch

from headrace.config import SoftmaxScheme
from headrace.errors import BackendUnavailable, ConfigError, nearest_name
from headrace.kernels import ops, reference
from headrace.kernels.dataflow import Dataflow
from headrace.kernels.linear_machine import CpuMachine
from headrace.kernels.tuning_cache import DeviceTuningKey, TuningKey
from headrace.machine import cpu_name

KERNELS_VARIABLE = "HEADRACE_KERNELS"
TuningKeyMaker = Callable[[int], TuningKey | DeviceTuningKey]
"""From a number of threads to what measurements with them hold for."""

_CPU = torch.device("cpu")
_NOT_BUILT = "the native module was not built: "


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
    """The ops a model runs on, chosen once. `explain()` says which implementation each one is, and why.

    device: where tensors that ops read and write lie.
    pads_steps: what `record` makes is dear, so that decode steps are recorded for a few sizes, and padded to them.
    join_replays: of two things that were recorded.
    dataflow, tuning_key: None where linear layers have one implementation only.
    prefill_library_obstacle: None where attention of prompts has one implementation only (`Dataflow`).
    stream: None where ops run in torch.
    """

    linear: ops.LinearOp
    embedding: ops.EmbeddingOp
    rms_norm: ops.RmsNormOp
    layer_norm: ops.LayerNormOp
    rotary_table: ops.RotaryTableOp
    rotary_store_kv_: ops.RotaryStoreKvOp
    add_: ops.AddOp
    attention: ops.AttentionOp
    attention_share: ops.AttentionShareOp
    join_heads: ops.JoinHeadsOp
    weigh_share: ops.WeighShareOp
    make_kv_cache: ops.MakeKvCacheOp
    kv_cache_num_bytes: ops.KvCacheNumBytesOp
    read_kv: ops.ReadKvOp
    activation: ops.ActivationOp
    gated_activation: ops.ActivationOp
    mixture: ops.MixtureOp
    argmax: ops.ArgmaxOp
    log_sum_exp: ops.LogSumExpOp
    top_k: ops.TopKOp
    quantize_rows: ops.QuantizeRowsOp
    make_weight_builder: ops.WeightBuilderOp
    weight_num_bytes: ops.WeightNumBytesOp
    weight_rows: ops.WeightRowsOp
    record: ops.RecordOp
    machine: ops.MachineOps
    set_num_threads: ops.SetNumThreadsOp
    softmax_schemes: tuple[SoftmaxScheme, ...]
    choices: tuple[OpChoice, ...]
    device: torch.device = _CPU
    pads_steps: bool = False
    join_replays: ops.JoinReplaysOp = ops.call_in_turn
    dataflow: Dataflow | None = None
    tuning_key: TuningKeyMaker | None = None
    prefill_library_obstacle: ops.LibraryPrefillObstacle | None = None
    stream: ops.NativeStream | None = None

    @property
    def has_expert_tiles(self) -> bool:
        """Whether mixtures have launches of their own to tune; else experts are linear layers like others."""
        return self.dataflow is not None and bool(self.dataflow.expert_block_rows)

    def explain(self) -> tuple[OpChoice, ...]:
        return self.choices


_OPS = tuple(field.name for field in fields(Kernels) if field.name in reference.__all__)
"""What each implementation may provide: the reference defines every op."""


def resolve_kernels(
    choice: KernelChoice,
    *,
    instruction_set: str | None = None,
    device: torch.device = _CPU,
    batch_invariant: bool = True,
) -> Kernels:
    """The ops for a choice.

    instruction_set: that of the native kernels; the best one the machine has if None.
    device: where the model lies.
    batch_invariant: on a CPU, leave out implementations that would make a row's last bits depend on its batch.

    Raises:
        BackendUnavailable: an implementation or an instruction set asked for by name that cannot run here.
    """
    asked_for = f"asked for by {KERNELS_VARIABLE}={choice.value}"
    match choice:
        case KernelChoice.REFERENCE:
            return _reference_kernels(asked_for, instruction_set, device)
        case KernelChoice.TRITON:
            return _triton_kernels(asked_for, instruction_set, device)
        case KernelChoice.CPU:
            if device != _CPU:
                raise BackendUnavailable(
                    f"{asked_for}, but the model lies on {device}; allowed there: triton, reference"
                )
            if isinstance(cpu := _import_cpu(), str):
                raise BackendUnavailable(f"{asked_for}, but {cpu}")
            return _cpu_kernels(cpu, instruction_set, asked_for, batch_invariant=batch_invariant)
        case KernelChoice.AUTO:
            if device != _CPU:
                return _triton_kernels(f"auto: the model lies on {device}", instruction_set, device)
            if isinstance(cpu := _import_cpu(), str):
                return _reference_kernels(f"auto: {cpu}", instruction_set, device)
            reason = "auto: native kernels run on this machine"
            return _cpu_kernels(cpu, instruction_set, reason, batch_invariant=batch_invariant)


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


def _import_cpu() -> ModuleType | str:
    """The package over the native module, or why it cannot be had."""
    try:
        return import_module("headrace.kernels.cpu")
    except ImportError as error:
        # A build without the native module leaves one that raises its reason (native/not_built.py.in).
        return str(error) if str(error).startswith(_NOT_BUILT) else f"the native module does not load: {error}"


def _check_no_instruction_set(instruction_set: str | None, reason: str) -> None:
    if instruction_set is not None:
        raise BackendUnavailable(f"instruction set '{instruction_set}' needs the native kernels; {reason}")


def _reference_ops(device: torch.device) -> dict[str, Any]:
    """By name. They compute where their tensors lie; those that make tensors of nothing are told where."""
    own: dict[str, Any] = {op: getattr(reference, op) for op in _OPS}
    return own | {op: partial(own[op], device=device) for op in ("make_kv_cache", "make_weight_builder")}


def _reference_kernels(reason: str, instruction_set: str | None, device: torch.device) -> Kernels:
    _check_no_instruction_set(instruction_set, reason)
    implementations = _reference_ops(device)
    choices = tuple(OpChoice(op=op, implementation="reference", reason=reason) for op in _OPS)
    return Kernels(
        **implementations,
        machine=reference.MachineOps(),
        set_num_threads=torch.set_num_threads,
        softmax_schemes=(SoftmaxScheme.SYNCHRONIZED,),
        choices=choices,
        device=device,
    )


def _triton_kernels(reason: str, instruction_set: str | None, device: torch.device) -> Kernels:
    """Ops on weights and those on KV caches come as two sets, as with the native kernels."""
    _check_no_instruction_set(instruction_set, reason)
    try:
        triton = import_module("headrace.kernels.triton")
    except ImportError as error:
        raise BackendUnavailable(f"{reason}, but Triton does not load: {error}") from None
    triton.check_device(device)
    implementations = _reference_ops(device)
    dataflow = Dataflow(triton.TritonMachine(device))
    own = triton.make_ops(device, dataflow)
    choices = tuple(
        OpChoice(op=op, implementation="triton" if op in own else "reference", reason=reason) for op in _OPS
    )
    return Kernels(
        **(implementations | own),
        machine=triton.MachineOps(device),
        set_num_threads=torch.set_num_threads,
        softmax_schemes=tuple(SoftmaxScheme),
        choices=choices,
        device=device,
        pads_steps="record" in own,
        dataflow=dataflow,
        tuning_key=lambda num_threads: triton.tuning_key(device),  # noqa: ARG005
        prefill_library_obstacle=partial(triton.prefill_library_obstacle, device),
    )


def _cpu_kernels(cpu: ModuleType, instruction_set: str | None, reason: str, *, batch_invariant: bool) -> Kernels:
    """Ops on weights come as one set, because only they read packed weights, and so do those on KV caches; the others
    are the reference's."""
    reason_by_op = dict.fromkeys(_OPS, f"{reason}, but not for this op yet")
    implementations = _reference_ops(_CPU)
    target = instruction_set or cpu.best_target()
    is_batch_invariant = batch_invariant or not cpu.has_float16_tiles(target)
    measured_as = target if is_batch_invariant else f"{target}, not batch invariant"
    dataflow = Dataflow(CpuMachine(is_batch_invariant=is_batch_invariant))
    stream = cpu.Stream()
    native = cpu.make_ops(target, stream, dataflow, batch_invariant=is_batch_invariant)
    reason_by_op |= dict.fromkeys(native, f"{reason}; instruction set {measured_as}")
    choices = tuple(
        OpChoice(op=op, implementation="cpu" if op in native else "reference", reason=reason_by_op[op]) for op in _OPS
    )
    return Kernels(
        **(implementations | native),
        machine=cpu.MachineOps(target),
        set_num_threads=cpu.set_num_threads,
        softmax_schemes=tuple(SoftmaxScheme),
        choices=choices,
        join_replays=cpu.join_replays,
        dataflow=dataflow,
        stream=stream,
        tuning_key=lambda num_threads: TuningKey(
            cpu=cpu_name(), num_threads=num_threads, instruction_set=measured_as, kernels=cpu.kernels_digest()
        ),
    )
