"""What a launcher (`mpiexec`, `srun`, `torchrun`) tells the processes it starts about their place."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace

from headrace.config.parallel import Transport

_MPI_VARIABLES = (
    ("PMI_RANK", "PMI_SIZE"),  # MPICH's mpiexec, Intel's, and srun with PMI-2
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
    ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS"),
)
_TORCHRUN_VARIABLES = ("RANK", "WORLD_SIZE")
_TORCHRUN_LOCAL_SIZE = "LOCAL_WORLD_SIZE"
_TORCHRUN_MARK = "TORCHELASTIC_RUN_ID"


@dataclass(frozen=True, kw_only=True)
class Launched:
    """launcher: for people. transport: what ranks of this launcher exchange tensors through on CPUs, unless told
    otherwise. num_local_ranks: of this host, where the launcher says so."""

    rank: int
    world_size: int
    launcher: str
    transport: Transport
    num_local_ranks: int | None = None


def launched_from(environ: Mapping[str, str] = os.environ) -> Launched | None:
    """This process's place among those a launcher has started; None if it is alone."""
    for rank, size in _MPI_VARIABLES:
        if found := _read(environ, rank, size, "mpiexec or srun", Transport.MPI):
            return found
    if _TORCHRUN_MARK in environ:
        found = _read(environ, *_TORCHRUN_VARIABLES, "torchrun", Transport.GLOO)
        size = environ.get(_TORCHRUN_LOCAL_SIZE, "")
        return replace(found, num_local_ranks=int(size)) if found is not None and size.isdigit() else found
    return None


def _read(environ: Mapping[str, str], rank: str, size: str, launcher: str, transport: Transport) -> Launched | None:
    values = environ.get(rank, ""), environ.get(size, "")
    if not all(value.isdigit() for value in values) or int(values[1]) < 2:
        return None
    return Launched(rank=int(values[0]), world_size=int(values[1]), launcher=launcher, transport=transport)
