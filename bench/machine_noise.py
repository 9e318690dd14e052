"""Whether the machine was quiet: what others used of it while nothing of ours ran, and how far its limits moved."""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import psutil

MAX_OTHERS_SHARE = 0.05
MAX_STEAL_SHARE = 0.02
MAX_LIMIT_SPREAD = 0.10


@dataclass(frozen=True, kw_only=True)
class CpuUse:
    """Shares of all CPUs' time over an interval: used by any process, and taken by the host of a virtual machine."""

    busy: float
    steal: float


class CpuClock:
    """Reads the system's CPU counters; `use` is what they say of the time since the clock was made."""

    def __init__(self) -> None:
        self._start = psutil.cpu_times()

    def use(self) -> CpuUse:
        start, now = self._start._asdict(), psutil.cpu_times()._asdict()
        # Guests' time is counted in user time already.
        spent = {name: now[name] - start[name] for name in now if not name.startswith("guest")}
        total = sum(spent.values()) or 1.0
        idle, steal = spent["idle"] + spent.get("iowait", 0.0), spent.get("steal", 0.0)
        return CpuUse(busy=(total - idle - steal) / total, steal=steal / total)


def wait_and_listen(seconds: float) -> CpuUse:
    """Do nothing for a while, and see what others do."""
    clock = CpuClock()
    time.sleep(seconds)
    return clock.use()


def spread(values: Sequence[float]) -> float:
    """How far the worst is below the best: 0.1 is a tenth."""
    return 1 - min(values) / max(values)


def remarks(idle: Sequence[CpuUse], running: Sequence[CpuUse], read_gb_per_s: Sequence[float]) -> list[str]:
    """What made the figures less sure; nothing on a quiet machine."""
    found = []
    others = max((use.busy for use in idle), default=0.0)
    if others > MAX_OTHERS_SHARE:
        found.append(f"other processes used up to {others:.0%} of the CPUs between measurements")
    stolen = max((use.steal for use in (*idle, *running)), default=0.0)
    if stolen > MAX_STEAL_SHARE:
        found.append(f"the host took up to {stolen:.0%} of the CPUs' time")
    if read_gb_per_s and spread(read_gb_per_s) > MAX_LIMIT_SPREAD:
        found.append(
            f"read bandwidth was {min(read_gb_per_s):.1f} GB/s in one round, {max(read_gb_per_s):.1f} in another"
        )
    return found
