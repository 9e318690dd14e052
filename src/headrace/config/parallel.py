"""How a model is spread over ranks, and what the ranks exchange."""

from dataclasses import dataclass
from enum import Enum

from headrace.config.checks import check_at_least_one
from headrace.errors import ConfigError, ParallelismError


class Transport(Enum):
    """What carries tensors between ranks.

    AUTO  NCCL on GPUs; on CPUs MPI if `mpiexec` or `srun` started this process, gloo if `torchrun` did, else shared
          memory
    SHM   shared memory, between ranks of one host that Headrace has started itself
    MPI   between ranks that `mpiexec` or `srun` has started, on one host or several
    GLOO  torch.distributed's reference for CPUs
    NCCL  torch.distributed on GPUs, between ranks that Headrace has started itself, or `torchrun` has; AMD's RCCL has
          its name
    """

    AUTO = "auto"
    SHM = "shm"
    MPI = "mpi"
    GLOO = "gloo"
    NCCL = "nccl"


class AllReduceDtype(Enum):
    """Type that partial sums travel as; AUTO is that of the activations.

    INT8 has a float32 scale for each 64 values, serves messages of many rows alone, and loses some precision; the
    others travel as the activations do.
    """

    AUTO = "auto"
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    INT8 = "int8"


class KvSharding(Enum):
    """What ranks that share a KV head hold of it, where there are more ranks than KV heads.

    REPLICATED      each holds all of its context
    SEQUENCE        each holds its share of the context's blocks, and attends it for the query heads of all who share;
                    a reduce-scatter then gives each the results of its own query heads
    SEQUENCE_FUSED  the same, but each also holds the output projection of all those heads: its partial results are
                    added up by the all-reduce that follows the projection anyway
    """

    REPLICATED = "replicated"
    SEQUENCE = "sequence"
    SEQUENCE_FUSED = "sequence_fused"

    @property
    def splits_contexts(self) -> bool:
        return self is not KvSharding.REPLICATED


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """tensor_parallel_size * pipeline_parallel_size ranks; rank = stage * tensor_parallel_size + rank within the stage.

    pipeline_layers: layers of each stage; None splits them evenly, earlier stages taking what is left over.
    deadline_s: a rank that shows no sign of life for so long is given up, and with it the engine.

    Literal behaviour, as the published formulas count it, instead of what moves fewer bytes:
        shard_embedding: the input embedding is cut by vocabulary, and summed over ranks (the + 1 of 2L + 1).
        send_residual: stages send hidden states and residual apart (the factor 2 of V_pp).
        slice_boundary: each rank of a stage sends 1 / t of its tensor, which the receiving ranks gather.
        gather_logits: whole logits are gathered for sampling, in the activations' type.
    """

    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    pipeline_layers: tuple[int, ...] | None = None
    transport: Transport = Transport.AUTO
    all_reduce_dtype: AllReduceDtype = AllReduceDtype.AUTO
    kv_sharding: KvSharding = KvSharding.REPLICATED
    shard_embedding: bool = False
    send_residual: bool = False
    slice_boundary: bool = False
    gather_logits: bool = False
    deadline_s: float = 30.0

    def __post_init__(self) -> None:
        check_at_least_one("tensor_parallel_size", self.tensor_parallel_size)
        check_at_least_one("pipeline_parallel_size", self.pipeline_parallel_size)
        layers = self.pipeline_layers
        if layers is not None and (len(layers) != self.pipeline_parallel_size or min(layers, default=0) < 1):
            raise ParallelismError(
                f"pipeline_layers are {','.join(map(str, layers))}; give one number of at least 1 for each of the "
                f"{self.pipeline_parallel_size} stages"
            )
        if not self.deadline_s >= 1:
            raise ConfigError(f"deadline_s is {self.deadline_s}; allowed: 1 and more seconds")

    @property
    def world_size(self) -> int:
        return self.tensor_parallel_size * self.pipeline_parallel_size
