"""A rank as `headrace.engine.rank_process` runs it; rank 1's memory runs out now and then while it runs steps."""

from collections.abc import Callable

from failing_memory import Faults

from headrace.engine import load_rank, rank_process
from headrace.engine.worker import Worker
from headrace.parallel.native_group import NativeGroup
from headrace.parallel.torch_group import TorchGroup

PERIOD = 53


def run_out_of_memory(run: Callable[[], None]) -> None:
    """`run`, with faults in this process's steps, if it is rank 1."""
    faults = Faults(1, PERIOD)
    resolve, execute = load_rank.resolve_kernels, Worker.execute

    def failing(worker, plan):
        faults.is_on, faults.step = worker._exchanges.check._rank == 1, lambda: plan.step
        return execute(worker, plan)

    load_rank.resolve_kernels = lambda *args, **kwargs: faults.kernels(resolve(*args, **kwargs))
    Worker.execute = failing
    with (
        faults.sparing_reserves(),
        faults.in_exchanges(NativeGroup),
        faults.in_exchanges(TorchGroup),
        faults.in_sampling(),
    ):
        run()


if __name__ == "__main__":
    run_out_of_memory(rank_process.main)
