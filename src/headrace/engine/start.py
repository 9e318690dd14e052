"""The world of an engine: none but itself, ranks of its own making, or those that it was started among."""

from dataclasses import replace
from pathlib import Path

from headrace.config import AllReduceDtype, EngineConfig, ParallelConfig, Transport
from headrace.config.launched import Launched, launched_from
from headrace.costs.micro_batches import max_prompt_tokens
from headrace.errors import ParallelismError
from headrace.models.families import read_model_config
from headrace.models.json_file import read_json
from headrace.parallel.launched_world import join_launched_world
from headrace.parallel.local_world import start_local_world
from headrace.parallel.world import World, one_rank_world

_RANK_MODULE = "headrace.engine.rank_process"


def start_world(config: EngineConfig) -> World:
    """
    config: with its transport resolved, see `resolve_transport`.

    Raises:
        ParallelismError: ranks that `mpiexec` or `srun` has started and that do not fit the layout.
        OSError: no room for another process.
    """
    parallel = config.parallel
    if parallel.world_size == 1:
        return one_rank_world()
    launched = launched_from()
    if launched is not None:
        return join_launched_world(parallel, launched)
    return start_local_world(parallel, _RANK_MODULE, config, micro_batch_bytes=_micro_batch_bytes(config))


def resolve_transport(config: EngineConfig) -> EngineConfig:
    """The same settings with the transport that will be used in place of `auto`.

    Raises:
        ParallelismError: a transport that does not join these ranks, or does not carry what is asked for.
    """
    parallel, launched = config.parallel, launched_from()
    if parallel.world_size == 1:
        return config
    if parallel.transport is Transport.AUTO:
        parallel = replace(parallel, transport=Transport.SHM if launched is None else launched.transport)
    _check(parallel, launched)
    return replace(config, parallel=parallel)


def _check(parallel: ParallelConfig, launched: Launched | None) -> None:
    if launched is not None and parallel.transport is Transport.SHM:
        raise ParallelismError(
            f"{launched.launcher} has started this rank, and transport 'shm' joins ranks that it has not; use mpi"
        )
    if launched is None and parallel.transport is Transport.MPI:
        raise ParallelismError(
            f"transport is 'mpi', but no launcher has started this process; put `mpiexec -n {parallel.world_size}` "
            "before the command, or leave the transport to auto"
        )
    if parallel.all_reduce_dtype is AllReduceDtype.INT8 and parallel.transport in (Transport.GLOO, Transport.NCCL):
        raise ParallelismError(
            f"all_reduce_dtype is 'int8', which transport '{parallel.transport.value}' lacks; use shm or mpi"
        )


def _micro_batch_bytes(config: EngineConfig) -> int:
    """What a stage sends the next for one step, at most: hidden states and residual in float32."""
    _, model = read_model_config(read_json(Path(config.load.model) / "config.json"))
    scheduler = config.scheduler
    num_tokens = scheduler.max_num_seqs + max_prompt_tokens(
        scheduler.max_num_batched_tokens, config.parallel.pipeline_parallel_size
    )
    return 2 * num_tokens * model.hidden_size * 4
