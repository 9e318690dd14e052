"""The world of an engine: none but itself, ranks of its own making, or those that it was started among."""

from dataclasses import replace
from pathlib import Path

from headrace.config import AllReduceDtype, Device, DeviceKind, EngineConfig, ModelConfig, ParallelConfig, Transport
from headrace.config.launched import Launched, launched_from
from headrace.costs.micro_batches import max_prompt_tokens
from headrace.engine.devices import GpuFacts, resolve_device
from headrace.engine.kv_cache_spec import RankShape
from headrace.errors import ParallelismError
from headrace.kernels import kernel_choice_from
from headrace.models.families import read_model_config
from headrace.models.json_file import read_json
from headrace.parallel.launched_world import join_launched_world
from headrace.parallel.local_world import start_local_world
from headrace.parallel.place import Place
from headrace.parallel.world import World, one_rank_world

_RANK_MODULE = "headrace.engine.rank_process"


def start_world(config: EngineConfig) -> World:
    """
    config: with its transport resolved, see `resolve_transport`.

    Raises:
        ParallelismError: a layout that does not divide the model, or ranks of a launcher that do not fit it.
        OSError: no room for another process.
    """
    parallel = config.parallel
    if parallel.world_size == 1:
        return one_rank_world()
    launched = launched_from()
    if launched is not None:
        return join_launched_world(parallel, launched)
    _, model = read_model_config(read_json(Path(config.load.model) / "config.json"))
    # Before another rank is started, so that a layout that does not divide the model is said at once.
    RankShape.of(model, Place(rank=0, config=parallel))
    return start_local_world(parallel, _RANK_MODULE, config, micro_batch_bytes=_micro_batch_bytes(config, model))


def resolve_transport(config: EngineConfig, facts: GpuFacts | None = None) -> EngineConfig:
    """The same settings with the transport that will be used in place of `auto`, and the device that it joins.

    facts: of this host's GPUs; None looks, if it matters.

    Raises:
        ParallelismError: a transport that does not join these ranks, or does not carry what is asked for.
        BackendUnavailable: GPUs were asked for, and there are too few.
    """
    parallel, launched = config.parallel, launched_from()
    if parallel.world_size == 1:
        if parallel.transport is not Transport.AUTO:
            raise ParallelismError(
                f"transport is '{parallel.transport.value}', but one rank has nobody to exchange anything with; leave "
                "the transport to auto, or ask for more ranks (--tp, --pp)"
            )
        return config
    device = _resolve_device(config, launched, facts)
    if parallel.transport is Transport.AUTO:
        parallel = replace(parallel, transport=_transport_for(device, launched))
    _check(parallel, launched, device)
    return replace(config, parallel=parallel, device=device)


def _resolve_device(config: EngineConfig, launched: Launched | None, facts: GpuFacts | None) -> Device:
    """What was asked for, or the kind of device that `auto` comes to: the same for all ranks."""
    device, transport = config.device, config.parallel.transport
    num_local_ranks = config.parallel.world_size if launched is None else launched.num_local_ranks
    if device.kind is DeviceKind.AUTO:
        if transport is Transport.NCCL:
            device = Device(kind=DeviceKind.CUDA)
        elif transport is not Transport.AUTO or num_local_ranks is None:
            return Device(kind=DeviceKind.CPU)
    if device.kind is DeviceKind.CPU or num_local_ranks is None:
        return device
    # Before another rank is started, so that too few GPUs are one rank's error.
    chosen = resolve_device(device, kernel_choice_from(), num_local_ranks=num_local_ranks, facts=facts)
    return device if device.kind is DeviceKind.CUDA else Device(kind=DeviceKind(chosen.device.type))


def _transport_for(device: Device, launched: Launched | None) -> Transport:
    if device.kind is DeviceKind.CUDA:
        return Transport.NCCL
    return Transport.SHM if launched is None else launched.transport


def _check(parallel: ParallelConfig, launched: Launched | None, device: Device) -> None:
    transport = parallel.transport
    if launched is not None and transport is Transport.SHM:
        raise ParallelismError(
            f"{launched.launcher} has started this rank, and transport 'shm' joins ranks that it has not; use mpi"
        )
    if launched is None and transport is Transport.MPI:
        raise ParallelismError(
            f"transport is 'mpi', but no launcher has started this process; put `mpiexec -n {parallel.world_size}` "
            "before the command, or leave the transport to auto"
        )
    if transport is Transport.NCCL:
        _check_nccl(parallel, launched, device)
    elif device.kind is DeviceKind.CUDA:
        raise ParallelismError(
            f"transport is '{transport.value}', which joins ranks on CPUs, but device is '{device}'; use nccl, or "
            "leave the transport to auto"
        )
    elif transport is Transport.GLOO and parallel.all_reduce_dtype is AllReduceDtype.INT8:
        raise ParallelismError("all_reduce_dtype is 'int8', which transport 'gloo' lacks; use shm or mpi")


def _check_nccl(parallel: ParallelConfig, launched: Launched | None, device: Device) -> None:
    if device.kind is not DeviceKind.CUDA:
        raise ParallelismError(
            f"transport is 'nccl', which joins ranks on GPUs, but device is '{device}'; use shm, mpi or gloo, or set "
            "the device to cuda"
        )
    if launched is not None and launched.transport is Transport.MPI:
        raise ParallelismError(
            f"{launched.launcher} has started this rank, but over NCCL find each other only ranks that torchrun has "
            "started, or that Headrace starts itself on one host; use one of these, or set the device to cpu"
        )
    if parallel.all_reduce_dtype is AllReduceDtype.INT8:
        raise ParallelismError(
            "all_reduce_dtype is 'int8', which transport 'nccl' lacks; allowed on GPUs: auto, float32, bfloat16"
        )


def _micro_batch_bytes(config: EngineConfig, model: ModelConfig) -> int:
    """What a stage sends the next for one step, at most: hidden states and residual in float32."""
    scheduler = config.scheduler
    num_tokens = scheduler.max_num_seqs + max_prompt_tokens(
        scheduler.max_num_batched_tokens, config.parallel.pipeline_parallel_size
    )
    return 2 * num_tokens * model.hidden_size * 4
