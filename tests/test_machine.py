"""Limits are read from made-up cgroup trees, so that every case is tested on any machine."""

import os
from pathlib import Path

import pytest

from headrace import machine


def write_tree(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text + "\n")
    return root


@pytest.fixture
def own_cgroup(tmp_path: Path) -> Path:
    file = tmp_path / "own"
    file.write_text("0::/user/app\n")
    return file


def test_no_cgroup_means_no_quota(tmp_path: Path) -> None:
    limits = machine.cpu_limits(tmp_path / "none", tmp_path / "none")
    assert limits.quota is None
    assert limits.num_threads == len(os.sched_getaffinity(0))


@pytest.mark.parametrize(
    ("quota", "expected"), [("150000 100000", 1.5), ("max 100000", None), ("50000 100000", 0.5), ("", None)]
)
def test_cpu_quota_of_version_2(tmp_path: Path, own_cgroup: Path, quota: str, expected: float | None) -> None:
    root = write_tree(tmp_path / "cg", {"user/app/cpu.max": quota})
    limits = machine.cpu_limits(root, own_cgroup)
    assert limits.quota == expected
    assert limits.num_threads >= 1


def test_tightest_parent_counts(tmp_path: Path, own_cgroup: Path) -> None:
    files = {"cpu.max": "max 100000", "user/cpu.max": "100000 100000", "user/app/cpu.max": "800000 100000"}
    assert machine.cpu_limits(write_tree(tmp_path / "cg", files), own_cgroup).quota == 1.0


def test_quota_below_the_affinity_mask_limits_threads() -> None:
    assert machine.CpuLimits(affinity=8, quota=2.5).num_threads == 2
    assert machine.CpuLimits(affinity=2, quota=16.0).num_threads == 2
    assert machine.CpuLimits(affinity=4, quota=0.2).num_threads == 1


def test_more_threads_than_cpus_are_explained() -> None:
    """--threads 100 on 2 CPUs was taken without a remark, and ran thirty times slower than 2."""
    limits = machine.CpuLimits(affinity=8, quota=6.5)
    for num_ranks in range(1, 9):
        for num_threads in range(1, 10):
            # One thread is the least that a rank can have.
            is_excess = num_threads > 1 and num_threads * num_ranks > 6
            assert (limits.explain_excess(num_threads, num_ranks) is not None) == is_excess
    found = machine.CpuLimits(affinity=2, quota=None).explain_excess(100)
    assert found == "slower than 2: this process may use 2 CPUs, and a thread that waits for one holds up the others"
    assert "slower than 3: 2 ranks together may use 6 CPUs" in (limits.explain_excess(4, num_ranks=2) or "")


def test_affinity_mask_is_respected() -> None:
    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(before)})
        assert machine.cpu_limits(Path("/nonexistent"), Path("/nonexistent")).affinity == 1
    finally:
        os.sched_setaffinity(0, before)


def test_memory_of_version_2_gives_cached_files_back(tmp_path: Path, own_cgroup: Path) -> None:
    files = {
        "user/app/memory.max": str(100 * 2**20),
        "user/app/memory.current": str(80 * 2**20),
        "user/app/memory.stat": f"anon 1\ninactive_file {30 * 2**20}",
    }
    root = write_tree(tmp_path / "cg", files)
    assert machine.memory_limit_bytes(root, own_cgroup) == 100 * 2**20
    assert machine.available_memory_bytes(root, own_cgroup) == 50 * 2**20


def test_memory_of_version_1(tmp_path: Path) -> None:
    own = tmp_path / "own"
    own.write_text("5:memory:/box\n4:cpu,cpuacct:/box\n")
    files = {
        "memory/box/memory.limit_in_bytes": str(64 * 2**20),
        "memory/box/memory.usage_in_bytes": str(60 * 2**20),
        "memory/memory.limit_in_bytes": str(2**63 - 4096),
        "cpu/box/cpu.cfs_quota_us": "200000",
        "cpu/box/cpu.cfs_period_us": "100000",
    }
    root = write_tree(tmp_path / "cg", files)
    assert machine.available_memory_bytes(root, own) == 4 * 2**20
    assert machine.cpu_limits(root, own).quota == 2.0


def test_container_whose_cgroup_path_is_the_hosts(tmp_path: Path) -> None:
    """The path in /proc/self/cgroup may not exist inside a container; the mounted root then carries the limit."""
    own = tmp_path / "own"
    own.write_text("0::/docker/abc\n")
    root = write_tree(tmp_path / "cg", {"memory.max": str(32 * 2**20), "memory.current": "0"})
    assert machine.available_memory_bytes(root, own) == 32 * 2**20


def test_peak_memory_sees_an_allocation() -> None:
    before = machine.peak_memory_bytes()
    block = bytearray(64 * 2**20)
    block[::4096] = b"x" * len(block[::4096])
    assert machine.peak_memory_bytes() >= before
    del block
    if machine.reset_peak_memory():
        assert machine.peak_memory_bytes() > 0


def test_this_cpu_has_a_name() -> None:
    assert machine.cpu_name()
    assert all(isinstance(name, str) for name in machine.instruction_sets())
