"""What carries tensors between ranks that find each other through torch's store."""

from typing import TYPE_CHECKING

from headrace.config import ParallelConfig, Transport
from headrace.parallel.fabric import Fabric

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store


def store_fabric(config: ParallelConfig, store: "Store", rank: int) -> Fabric:
    """
    Raises:
        BackendUnavailable: a build of torch that lacks the transport.
    """
    if config.transport is Transport.NCCL:
        from headrace.parallel.nccl_fabric import NcclFabric

        return NcclFabric(store, rank, config.deadline_s)
    from headrace.parallel.torch_fabric import TorchFabric

    return TorchFabric(store, rank, config.deadline_s)
