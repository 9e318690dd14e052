"""What this process may use of the machine: CPUs, memory, instruction sets. Respects affinity and cgroups; no torch."""

import math
import os
import platform
from dataclasses import dataclass
from pathlib import Path

import psutil

_CGROUP_ROOT = Path("/sys/fs/cgroup")
_OWN_CGROUP = Path("/proc/self/cgroup")
_CPUINFO = Path("/proc/cpuinfo")

_INSTRUCTION_SETS = {
    "avx2": "AVX2",
    "fma": "FMA",
    "f16c": "F16C",
    "avx512f": "AVX-512F",
    "avx512bw": "AVX-512BW",
    "avx512_vnni": "AVX-512 VNNI",
    "avx512_bf16": "AVX-512 BF16",
    "avx_vnni": "AVX VNNI",
    "amx_bf16": "AMX BF16",
    "amx_int8": "AMX INT8",
    "amx_fp16": "AMX FP16",
    "asimd": "NEON",
    "asimddp": "NEON dot product",
    "bf16": "NEON BF16",
    "i8mm": "NEON I8MM",
    "sve": "SVE",
}


@dataclass(frozen=True, kw_only=True)
class CpuLimits:
    """affinity: CPUs in the affinity mask; quota: CPUs' worth of time the cgroup grants, None if unlimited."""

    affinity: int
    quota: float | None

    @property
    def num_threads(self) -> int:
        """Threads worth running: more than the quota would only be throttled."""
        return self.affinity if self.quota is None else max(1, min(self.affinity, math.floor(self.quota)))

    def threads_per_rank(self, num_ranks: int) -> int:
        """The same for each of so many processes that work side by side."""
        return max(1, self.num_threads // num_ranks)

    def explain_excess(self, num_threads: int, num_ranks: int = 1) -> str | None:
        """Why each of so many ranks would be faster with fewer threads; None if it would not."""
        best = self.threads_per_rank(num_ranks)
        if num_threads <= best:
            return None
        whose = "this process" if num_ranks == 1 else f"{num_ranks} ranks together"
        cpus = "1 CPU" if self.num_threads == 1 else f"{self.num_threads} CPUs"
        return f"slower than {best}: {whose} may use {cpus}, and a thread that waits for one holds up the others"


def cpu_limits(cgroup_root: Path = _CGROUP_ROOT, own_cgroup: Path = _OWN_CGROUP) -> CpuLimits:
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
    quotas = [quota for folder in _cgroup_folders(cgroup_root, own_cgroup) if (quota := _cpu_quota(folder)) is not None]
    return CpuLimits(affinity=affinity, quota=min(quotas, default=None))


def available_memory_bytes(cgroup_root: Path = _CGROUP_ROOT, own_cgroup: Path = _OWN_CGROUP) -> int:
    """Memory this process can still take: the machine's, or what is left under the tightest cgroup limit."""
    rooms = [room for folder in _cgroup_folders(cgroup_root, own_cgroup) if (room := _memory_room(folder)) is not None]
    return min([int(psutil.virtual_memory().available), *rooms])


def memory_limit_bytes(cgroup_root: Path = _CGROUP_ROOT, own_cgroup: Path = _OWN_CGROUP) -> int:
    """The machine's memory, or the tightest cgroup limit."""
    limits = [
        limit for folder in _cgroup_folders(cgroup_root, own_cgroup) if (limit := _memory_limit(folder)) is not None
    ]
    return min([int(psutil.virtual_memory().total), *limits])


def peak_memory_bytes() -> int:
    """The most memory this process has had resident since it started (or since `reset_peak_memory`)."""
    for line in _lines(Path("/proc/self/status")):
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return int(psutil.Process().memory_info().rss)


def reset_peak_memory() -> bool:
    """Start `peak_memory_bytes` afresh; False where the kernel does not allow it."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def cpu_name() -> str:
    for line in _lines(_CPUINFO):
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def host_id() -> str:
    """Equal for processes of one running system."""
    file = Path("/proc/sys/kernel/random/boot_id")
    return file.read_text().strip() if file.exists() else os.uname().nodename


def instruction_sets() -> tuple[str, ...]:
    """The vector extensions that matter for inference and that this CPU reports."""
    for line in _lines(_CPUINFO):
        if line.startswith(("flags", "Features")):
            flags = set(line.partition(":")[2].split())
            return tuple(name for flag, name in _INSTRUCTION_SETS.items() if flag in flags)
    return ()


def _cgroup_folders(root: Path, own_cgroup: Path) -> list[Path]:
    """Folders that may limit this process: its own cgroup and each parent (v2), or its controllers' folders (v1).

    Inside a container the path of the cgroup as the host sees it may not exist; the root then carries the limits.
    """
    folders = {root}
    for line in _lines(own_cgroup):
        _, controllers, path = [*line.split(":", 2), "", ""][:3]
        for controller in controllers.split(","):
            base = root / controller if controller else root
            folder = base / path.strip("/")
            folders.update(f for f in (folder, *folder.parents) if f == base or base in f.parents)
    return sorted(folder for folder in folders if folder.is_dir())


def _cpu_quota(folder: Path) -> float | None:
    quota, period = [*_first_line(folder / "cpu.max").split(), "", ""][:2]
    if not quota:
        quota, period = _first_line(folder / "cpu.cfs_quota_us"), _first_line(folder / "cpu.cfs_period_us")
    return int(quota) / int(period) if quota.isdigit() and period.isdigit() and int(period) > 0 else None


def _memory_limit(folder: Path) -> int | None:
    limit = _first_line(folder / "memory.max") or _first_line(folder / "memory.limit_in_bytes")
    # Version 1 writes "no limit" as a number near 2^63.
    return int(limit) if limit.isdigit() and int(limit) < 2**60 else None


def _memory_room(folder: Path) -> int | None:
    limit = _memory_limit(folder)
    used = _first_line(folder / "memory.current") or _first_line(folder / "memory.usage_in_bytes")
    if limit is None or not used.isdigit():
        return limit
    # Cached file pages count as used but are given back on demand.
    return max(0, limit - int(used) + _inactive_file_bytes(folder))


def _inactive_file_bytes(folder: Path) -> int:
    for line in _lines(folder / "memory.stat"):
        name, _, value = line.partition(" ")
        if name in ("inactive_file", "total_inactive_file") and value.isdigit():
            return int(value)
    return 0


def _first_line(file: Path) -> str:
    lines = _lines(file)
    return lines[0] if lines else ""


def _lines(file: Path) -> list[str]:
    try:
        return file.read_text().splitlines()
    except OSError:
        return []
