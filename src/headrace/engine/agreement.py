"""What ranks tell rank 0 once they have loaded their part, and what it decides for all of them."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from headrace.engine.device_memory import available_bytes, memory_owner
from headrace.engine.loaded_rank import LoadedRank
from headrace.engine.worker import Worker
from headrace.parallel.world import World


@dataclass(frozen=True, kw_only=True)
class RankReport:
    """What rank 0 must know of a rank to size the cache.

    host: equal for ranks that share memory, which on GPUs none do. available_bytes: less what steps need.
    """

    host: str
    block_bytes: int
    available_bytes: int
    weight_bytes: int

    @classmethod
    def of(cls, loaded: LoadedRank) -> "RankReport":
        return cls(
            host=memory_owner(loaded.kernels.device),
            block_bytes=loaded.block_bytes,
            available_bytes=max(0, available_bytes(loaded.kernels.device) - loaded.step_bytes),
            weight_bytes=loaded.weight_bytes,
        )


def tightest_host(reports: Sequence[RankReport]) -> tuple[int, int]:
    """(block_bytes, available_bytes) of the host with room for the fewest blocks; a block is one of all its ranks."""
    rooms = {}
    for host in {report.host for report in reports}:
        there = [report for report in reports if report.host == host]
        rooms[host] = (sum(r.block_bytes for r in there), min(r.available_bytes for r in there))
    return min(rooms.values(), key=lambda room: room[1] / room[0])


def agree(world: World, loaded: LoadedRank) -> list[RankReport]:
    """Rank 0: hear what every rank has loaded, rank 0 first."""
    reports = [RankReport.of(loaded)]
    for rank in world.control:
        reports.append(RankReport(**json.loads(world.receive(rank))))
    return reports


def announce(world: World, agreement: Mapping[str, Any]) -> None:
    """Rank 0: tell every rank what was agreed on, the arguments of `LoadedRank.make_worker`."""
    for rank in world.control:
        world.send(rank, json.dumps(agreement).encode())


def report_and_join(world: World, loaded: LoadedRank) -> Worker:
    """Another rank: say what was loaded, hear what was agreed on, and become a worker."""
    world.send(0, json.dumps(vars(RankReport.of(loaded))).encode())
    agreement = json.loads(world.receive(0))
    eos_token_ids = frozenset(agreement.pop("eos_token_ids"))
    return loaded.make_worker(**agreement, eos_token_ids=eos_token_ids, all_agree=world.all_agree)
