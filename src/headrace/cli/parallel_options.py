"""Options of how a model is spread over ranks, and what these exchange."""

import argparse
from typing import Any

from headrace.cli.option_values import given_of, parse_layer_counts, words_of
from headrace.config import AllReduceDtype, KvSharding, ParallelConfig, Transport


def add_parallel_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "ranks", "processes that share the model; started on this host, or by `mpiexec -n N headrace ...` on several"
    )
    group.add_argument(
        "--tp",
        dest="tensor_parallel_size",
        type=int,
        metavar="T",
        help="ranks that share each layer (tensor parallelism; default: 1)",
    )
    group.add_argument(
        "--pp",
        dest="pipeline_parallel_size",
        type=int,
        metavar="P",
        help="stages of layers, one after the other (pipeline parallelism; default: 1)",
    )
    group.add_argument(
        "--pp-layers",
        dest="pipeline_layers",
        type=parse_layer_counts,
        metavar="N,N",
        help="layers of each stage (default: as even as possible)",
    )
    group.add_argument(
        "--transport",
        choices=words_of(Transport),
        help=f"what carries tensors between ranks (default: {ParallelConfig.transport.value}: nccl on GPUs; on CPUs "
        "mpi under mpiexec or srun, gloo under torchrun, else shm, shared memory)",
    )
    group.add_argument(
        "--all-reduce-dtype",
        choices=words_of(AllReduceDtype),
        help="type that ranks' summands travel as (default: that of the activations); int8 serves long messages over "
        "slow links, and is a little less exact",
    )
    group.add_argument(
        "--kv-sharding",
        choices=words_of(KvSharding),
        help="what ranks that share a KV head hold of its context: all of it, or a share "
        f"(default: {ParallelConfig.kv_sharding.value})",
    )
    group.add_argument(
        "--deadline",
        dest="deadline_s",
        type=float,
        metavar="S",
        help=f"give a rank up that shows no sign of life for so many seconds (default: {ParallelConfig.deadline_s:g})",
    )
    group.add_argument(
        "--literal",
        action="store_true",
        default=None,
        help="exchange what the published formulas count: --shard-embedding, --send-residual and --gather-logits",
    )
    group.add_argument("--shard-embedding", action="store_true", default=None, help="sum input embeddings over ranks")
    group.add_argument("--send-residual", action="store_true", default=None, help="two tensors from stage to stage")
    group.add_argument(
        "--slice-boundary", action="store_true", default=None, help="each rank sends its share, the next stage gathers"
    )
    group.add_argument("--gather-logits", action="store_true", default=None, help="gather whole logits for sampling")


def parallel_settings(args: argparse.Namespace) -> dict[str, Any]:
    """What was given of the layout, `--literal` as what it stands for."""
    given = given_of(args, tuple(ParallelConfig.__dataclass_fields__))
    if getattr(args, "literal", None):
        given |= {"shard_embedding": True, "send_residual": True, "gather_logits": True}
    return given
