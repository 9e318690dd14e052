"""What one of several ranks exchanges in its steps: foreseen, checked, and made in any case."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from headrace.config import SchedulerConfig, Transport
from headrace.costs.exchanges import Layout
from headrace.costs.steps import Event
from headrace.engine.device_memory import Reserve
from headrace.engine.exchange_check import ExchangeCheck
from headrace.engine.hollow_step import HollowStep, largest_exchange_bytes, largest_steps
from headrace.errors import RankError
from headrace.layers.context import LayerContext
from headrace.parallel.group import Group
from headrace.parallel.place import Place

_GRAPHS_BYTES = 64 * 2**20
"""For each group, generously: a graph's exchanges have some KiB each."""


@dataclass(frozen=True, kw_only=True)
class RankExchanges:
    """groups: all of the rank's. reserve: what its device keeps for exchanges.

    max_undone_steps: of those that this rank has run, how many may be undone together, as they do not fit another one:
        those in flight.
    """

    groups: tuple[Group, ...]
    check: ExchangeCheck
    hollow: HollowStep
    reserve: Reserve
    max_undone_steps: int

    def rehearse(self, steps: Iterable[Sequence[Event]]) -> None:
        """Make the exchanges of these steps, which nobody's output is made of. All ranks do.

        What carries them may take memory of its own at the first of a kind, a size or a type, which a step must not
        find missing.
        """
        self.reserve.release()
        for events in steps:
            for call in self.hollow.calls(events):
                call()
        if self.hollow.device.type != "cpu":
            torch.cuda.synchronize(self.hollow.device)
        self.reserve.restore()

    def complete(self, fallback_rows: int, *, is_own: bool) -> None:
        """Make those exchanges of the step begun last that have not been made, which nobody's output is made of.

        fallback_rows: see `ExchangeCheck.end_step`. is_own: it is this rank that has run out of memory.

        Raises:
            RankError: others may wait for what follows from words that this rank could not read. Those it reads into
                its reserve.
        """
        self.reserve.release()
        num_made, events = self.check.num_calls_of_step, self.check.step
        calls = list(self.hollow.calls(events))
        if is_own and num_made > len(calls) - self.hollow.num_sampling_calls(events):
            raise RankError("there is no memory left to sample from what ranks have brought")
        for call in calls[num_made:]:
            call()
        self.check.end_step(fallback_rows)
        self.reserve.restore()


def make_rank_exchanges(
    layout: Layout,
    place: Place,
    context: LayerContext,
    groups: Sequence[Group],
    scheduler: SchedulerConfig,
    *,
    dtype: torch.dtype,
) -> RankExchanges:
    """groups: tp, pp and kv. dtype: of activations.

    Over NCCL the smallest and the largest steps are rehearsed. All ranks do, before what is free is taken for a cache.
    """
    device = context.kernels.device
    limits = {"max_num_tokens": scheduler.max_num_batched_tokens, "max_num_seqs": scheduler.max_num_seqs}
    # The host's memory is claimed as it is touched, and none of it is a rank's own.
    num_bytes = 0 if device.type == "cpu" else largest_exchange_bytes(layout, place.rank, **limits)
    exchanges = RankExchanges(
        groups=tuple(groups),
        check=ExchangeCheck(layout, place.rank, groups),
        hollow=HollowStep(layout, place, context, groups[1], dtype),
        reserve=Reserve(device, num_bytes),
        max_undone_steps=layout.parallel.pipeline_parallel_size,
    )
    if layout.parallel.transport is Transport.NCCL:
        exchanges.rehearse(largest_steps(layout, **limits))
    return exchanges


def later_bytes(groups: Sequence[Group], device: torch.device) -> int:
    """What NCCL may take of a GPU after the rehearsal: with graphs that hold exchanges, their work and the addresses of
    what they exchange."""
    return 0 if device.type == "cpu" else _GRAPHS_BYTES * sum(group.world_size > 1 for group in groups)
