"""A remark on more threads than there are CPUs."""

from headrace.cli.terminal import note
from headrace.config import ParallelConfig
from headrace.config.launched import launched_from
from headrace.machine import cpu_limits


def remark_on_threads(num_threads: int, parallel: ParallelConfig | None = None) -> None:
    """Say on stderr that so many threads, as asked for, of each rank are too many for this host, if they are."""
    excess = cpu_limits().explain_excess(num_threads, _num_local_ranks(parallel or ParallelConfig()))
    if excess is not None:
        note(f"--threads {num_threads} is {excess}")


def _num_local_ranks(parallel: ParallelConfig) -> int:
    """Ranks that share this host's CPUs, as far as that is known before they have met."""
    launched = launched_from()
    return parallel.world_size if launched is None else launched.num_local_ranks or 1
