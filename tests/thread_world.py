"""An engine whose ranks are threads of one process: every layout without the seconds that processes take to start."""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from thread_group import TIMEOUT_S, ThreadGroup, thread_groups

from headrace import LLM
from headrace.config import ParallelConfig, Transport
from headrace.config.settings import engine_config
from headrace.engine.engine import Engine
from headrace.engine.load_rank import load_rank
from headrace.engine.plan import StepPlan, StepResult
from headrace.engine.rank_statistics import RankStatistics
from headrace.engine.worker import Worker
from headrace.errors import OutOfDeviceMemory
from headrace.kernels import Kernels
from headrace.parallel.fabric import Fabric
from headrace.parallel.group import Group, OneRankGroup
from headrace.parallel.ledger import LedgerRow
from headrace.parallel.place import Place


class ThreadFabric:
    """Groups of threads by name and ranks."""

    def __init__(self) -> None:
        self._groups: dict[tuple[str, tuple[int, ...]], list[ThreadGroup]] = {}

    def make_group(self, rank: int, name: str, ranks: Sequence[int]) -> Group:
        if len(ranks) == 1:
            return OneRankGroup(name)
        groups = self._groups.setdefault((name, tuple(ranks)), thread_groups(len(ranks), name))
        return groups[list(ranks).index(rank)]

    def abort(self) -> None:
        for groups in self._groups.values():
            groups[0].abort()


class ThreadAgreement:
    """`World.all_agree` for threads."""

    def __init__(self, world_size: int) -> None:
        self._votes: list[bool] = []
        self._verdict = False
        self._barrier = threading.Barrier(world_size, self._count)

    def all_agree(self, agrees: bool) -> bool:
        self._votes.append(agrees)
        self._barrier.wait(TIMEOUT_S)
        return self._verdict

    def _count(self) -> None:
        self._verdict, self._votes = all(self._votes), []


class ThreadExecutor:
    """Every rank's worker runs every plan as soon as it is submitted, each in a thread of its own."""

    def __init__(self, fabric: ThreadFabric, workers: list[Worker], parallel: ParallelConfig) -> None:
        self.workers, self._fabric = workers, fabric
        self.max_in_flight = parallel.pipeline_parallel_size
        self._reporters = workers[-parallel.tensor_parallel_size :]
        self._pool = ThreadPoolExecutor(len(workers))
        self._results: list[StepResult | OutOfDeviceMemory] = []

    def submit(self, plan: StepPlan) -> None:
        results = list(self._pool.map(lambda worker: self._execute(worker, plan), self.workers))
        without_room = [result for result in results if isinstance(result, OutOfDeviceMemory)]
        if any(worker.knows_of_all(plan) for worker in self.workers):
            assert all(worker.knows_of_all(plan) for worker in self.workers)
            assert len(without_room) in (0, len(results)), "a rank has not heard of one without memory"
        first, *others = results[-len(self._reporters) :]
        assert without_room or all(other == first for other in others), "ranks have sampled different tokens"
        self._results.append(without_room[0] if without_room else first)

    def collect(self) -> StepResult:
        result = self._results.pop(0)
        if isinstance(result, OutOfDeviceMemory):
            raise result
        return result

    def reset(self) -> None:
        self._results.clear()
        for worker in self.workers:
            worker.reset()

    def close(self) -> None:
        self._pool.shutdown()

    def statistics(self) -> list[RankStatistics]:
        return [worker.statistics() for worker in self.workers]

    def exchange_s(self) -> float:
        return sum(row.transfer_s for row in self.workers[0].ledger_rows())

    def ledger_rows(self) -> list[list[LedgerRow]]:
        return [[row for group in worker.groups for row in group.ledger_rows()] for worker in self.workers]

    def _execute(self, worker: Worker, plan: StepPlan) -> StepResult | OutOfDeviceMemory:
        try:
            return worker.try_to_execute(plan)
        except threading.BrokenBarrierError:
            raise
        except BaseException:
            self._fabric.abort()
            raise


def thread_llm(
    folder: Path,
    *,
    dtype: str = "float32",
    quantize: str | None = None,
    change_kernels: Callable[[Kernels], Kernels] | None = None,
    fabrics: Sequence[Fabric] | None = None,
    transport: Transport = Transport.GLOO,
    **settings: Any,
) -> LLM:
    """`LLM` with these settings, those of `ParallelConfig` included, on ranks that are threads.

    fabrics: of each rank, what carries its tensors in the place of `ThreadFabric`; transport: whose rules they follow.
    """
    of_one_rank = {k: v for k, v in settings.items() if k not in ParallelConfig.__dataclass_fields__}
    llm = LLM(str(folder), dtype=dtype, quantize=quantize, device="cpu", **of_one_rank)
    model, fabric = llm.engine.model, ThreadFabric()
    # Ranks in threads bring whole tensors to every sum, as gloo's do.
    settings |= {"dtype": dtype, "quantize": quantize or "none", "transport": transport.value}
    config = engine_config(model=str(folder), device="cpu", **settings)

    agreement = ThreadAgreement(config.parallel.world_size)

    def worker(rank: int) -> Worker:
        of_threads = SimpleNamespace(make_group=lambda name, ranks, _: fabric.make_group(rank, name, ranks))
        world = SimpleNamespace(
            place=Place(rank=rank, config=config.parallel),
            num_ranks_on_host=1,
            local_rank=0,
            check=lambda: None,
            fabric=of_threads if fabrics is None else fabrics[rank],
        )
        return load_rank(config, folder, world, change_kernels=change_kernels).make_worker(
            num_blocks=model.plan.num_blocks,
            block_size=model.plan.cache.block_size,
            max_model_len=model.plan.max_model_len,
            eos_token_ids=model.eos_token_ids,
            all_agree=agreement.all_agree,
        )

    # Ranks wait for each other where groups are made, and where steps are recorded.
    with ThreadPoolExecutor(config.parallel.world_size) as pool:
        workers = list(pool.map(worker, range(config.parallel.world_size)))
    executor = ThreadExecutor(fabric, workers, config.parallel)
    llm.engine = Engine(replace(model, executor=executor))
    return llm
