"""The world of an engine: none but itself, ranks of its own making, or those that it was started among."""

from pathlib import Path

from headrace.config import AllReduceDtype, EngineConfig, ParallelConfig, Transport
from headrace.config.launched import launched_from
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
    Raises:
        ParallelismError: ranks that `mpiexec` or `srun` has started and that do not fit the layout.
        OSError: no room for another process.
    """
    parallel = config.parallel
    if parallel.world_size == 1:
        return one_rank_world()
    _check(parallel)
    launched = launched_from()
    if launched is not None and parallel.transport is not Transport.SHM:
        transport = launched.transport if parallel.transport is Transport.AUTO else parallel.transport
        return join_launched_world(parallel, launched, transport)
    if launched is not None:
        raise ParallelismError(
            f"{launched.launcher} has started this rank, and transport 'shm' joins ranks that it has not; use mpi"
        )
    if parallel.transport is Transport.MPI:
        raise ParallelismError(
            f"transport is 'mpi', but no launcher has started this process; put `mpiexec -n {parallel.world_size}` "
            "before the command, or leave the transport to auto"
        )
    transport = Transport.SHM if parallel.transport is Transport.AUTO else parallel.transport
    return start_local_world(parallel, transport, _RANK_MODULE, config, micro_batch_bytes=_micro_batch_bytes(config))


def _check(parallel: ParallelConfig) -> None:
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
