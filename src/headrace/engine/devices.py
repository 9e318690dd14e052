"""Which device a rank runs on, and what is known of this host's GPUs."""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version

import torch

from headrace.config import Device, DeviceKind
from headrace.errors import BackendUnavailable
from headrace.kernels import KernelChoice

_CPU = torch.device("cpu")

_LEAST_CAPABILITY = (8, 0)
"""Compute capability of the first NVIDIA GPUs that multiply bfloat16."""


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """obstacle: why the kernels cannot run on it; None if they can. capability: of NVIDIA's, "9.0"; of AMD's, the name
    of the architecture."""

    index: int
    name: str
    capability: str
    memory_bytes: int
    obstacle: str | None = None


@dataclass(frozen=True, kw_only=True)
class GpuFacts:
    """obstacle: why no GPU can be used, where that is no GPU's own fault. versions: of what runs kernels."""

    gpus: tuple[Gpu, ...]
    obstacle: str | None
    versions: dict[str, str | None]

    @property
    def usable(self) -> tuple[Gpu, ...]:
        return () if self.obstacle is not None else tuple(gpu for gpu in self.gpus if gpu.obstacle is None)

    def explain_none(self) -> str:
        """Why there is no usable GPU."""
        if self.obstacle is not None:
            return self.obstacle
        return "; ".join(f"GPU {gpu.index}, {gpu.name}: {gpu.obstacle}" for gpu in self.gpus)


@dataclass(frozen=True, kw_only=True)
class ChosenDevice:
    """reason: one line for people."""

    device: torch.device
    reason: str


def resolve_device(
    device: Device,
    kernels: KernelChoice = KernelChoice.AUTO,
    *,
    local_rank: int = 0,
    num_local_ranks: int = 1,
    facts: GpuFacts | None = None,
) -> ChosenDevice:
    """The device of the rank that is `local_rank`-th on this host: each has a GPU of its own, or all have the CPU.

    facts: of this host's GPUs; None looks.

    Raises:
        BackendUnavailable: a GPU was asked for, and there is none, or none that the kernels run on, or too few.
    """
    if device.kind is DeviceKind.CPU:
        return ChosenDevice(device=_CPU, reason="asked for")
    if device.kind is DeviceKind.AUTO and (reason := _needs_cpu(kernels)):
        return ChosenDevice(device=_CPU, reason=f"auto: {reason}")
    facts = gpu_facts() if facts is None else facts
    if device.kind is DeviceKind.AUTO:
        if len(facts.usable) < num_local_ranks:
            reason = _too_few(facts, num_local_ranks) if facts.usable else facts.explain_none()
            return ChosenDevice(device=_CPU, reason=f"auto: {reason}")
        gpu = facts.usable[local_rank]
        return ChosenDevice(device=torch.device("cuda", gpu.index), reason=f"auto: {gpu.name}")
    gpus = _asked_for(device, facts, num_local_ranks)
    return ChosenDevice(device=torch.device("cuda", gpus[local_rank].index), reason="asked for")


def _asked_for(device: Device, facts: GpuFacts, num_local_ranks: int) -> Sequence[Gpu]:
    """The GPUs that ranks on this host take, in their order."""
    if not facts.usable:
        raise BackendUnavailable(f"device is '{device}', but {facts.explain_none()}; use --device cpu, or repair that")
    if device.index is None:
        if len(facts.usable) < num_local_ranks:
            raise BackendUnavailable(f"device is '{device}', but {_too_few(facts, num_local_ranks)}; use fewer ranks")
        return facts.usable
    by_index = {gpu.index: gpu for gpu in facts.gpus}
    wanted = range(device.index, device.index + num_local_ranks)
    for index in wanted:
        if index not in by_index:
            raise BackendUnavailable(
                f"device is '{device}', but there is no GPU {index}; there are: {', '.join(map(str, by_index))}"
            )
        if (obstacle := by_index[index].obstacle) is not None:
            raise BackendUnavailable(f"device is '{device}', but GPU {index}, {by_index[index].name}: {obstacle}")
    return [by_index[index] for index in wanted]


def _needs_cpu(kernels: KernelChoice) -> str | None:
    """Why the implementation that was asked for runs on no GPU."""
    if kernels is KernelChoice.CPU:
        return "the native kernels run on the CPU"
    if kernels is KernelChoice.TRITON and _is_interpreted():
        return "TRITON_INTERPRET=1 runs Triton's kernels on the CPU"
    return None


def _is_interpreted() -> bool:
    try:
        triton = import_module("triton")
    except ImportError:
        return False
    return bool(triton.knobs.runtime.interpret)


def _too_few(facts: GpuFacts, num_local_ranks: int) -> str:
    return f"{num_local_ranks} ranks on this host have {len(facts.usable)} GPUs"


def gpu_facts() -> GpuFacts:
    """What torch and Triton say. Nothing is started on a GPU."""
    versions = {"cuda": torch.version.cuda, "hip": torch.version.hip, "triton": None}
    if torch.version.cuda is None and torch.version.hip is None:
        # Asked without importing it, which takes a quarter of a second that nobody has a use for here.
        with suppress(PackageNotFoundError):
            versions["triton"] = version("triton")
        obstacle = f"torch {torch.__version__} was built without CUDA or ROCm"
        return GpuFacts(gpus=(), obstacle=obstacle, versions=versions)
    try:
        versions["triton"] = import_module("triton").__version__
    except ImportError as error:
        return GpuFacts(gpus=_gpus(), obstacle=f"Triton does not load: {error}", versions=versions)
    gpus = _gpus()
    if not gpus:
        return GpuFacts(gpus=(), obstacle="torch sees no GPU (is a driver installed?)", versions=versions)
    if _is_interpreted():
        return GpuFacts(gpus=gpus, obstacle="TRITON_INTERPRET=1 runs kernels on the CPU", versions=versions)
    return GpuFacts(gpus=gpus, obstacle=None, versions=versions)


def _gpus() -> tuple[Gpu, ...]:
    if not torch.cuda.is_available():
        return ()
    return tuple(_gpu(index) for index in range(torch.cuda.device_count()))


def _gpu(index: int) -> Gpu:
    properties = torch.cuda.get_device_properties(index)
    capability = (properties.major, properties.minor)
    is_amd = torch.version.hip is not None
    obstacle = None
    if not is_amd and capability < _LEAST_CAPABILITY:
        least = ".".join(map(str, _LEAST_CAPABILITY))
        obstacle = f"its compute capability is {capability[0]}.{capability[1]}, and the kernels need {least}"
    return Gpu(
        index=index,
        name=properties.name,
        capability=properties.gcnArchName if is_amd else f"{capability[0]}.{capability[1]}",
        memory_bytes=properties.total_memory,
        obstacle=obstacle,
    )
