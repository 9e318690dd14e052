"""Versions and machine, as `info` and `bench` report them; no torch."""

import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import psutil

from headrace import __version__
from headrace.machine import (
    CpuLimits,
    available_memory_bytes,
    cpu_limits,
    cpu_name,
    instruction_sets,
    memory_limit_bytes,
)

_PACKAGES = ("torch", "numpy", "tokenizers", "safetensors", "huggingface-hub", "jinja2")


def versions() -> dict[str, str | None]:
    """None for what is not installed."""
    return {
        "headrace": __version__,
        "python": platform.python_version(),
        **{name: _version(name) for name in _PACKAGES},
    }


def machine(num_threads: int | None = None) -> dict[str, Any]:
    """num_threads: as asked for; None takes what the machine allows."""
    limits = cpu_limits()
    return {
        "cpu": cpu_name(),
        "architecture": platform.machine(),
        "system": platform.platform(),
        "instruction_sets": list(instruction_sets()),
        "affinity_cpus": limits.affinity,
        "quota_cpus": limits.quota,
        "num_threads": num_threads or limits.num_threads,
        "threads_reason": _explain_threads(limits, num_threads),
        "memory_total_bytes": int(psutil.virtual_memory().total),
        "memory_limit_bytes": memory_limit_bytes(),
        "memory_available_bytes": available_memory_bytes(),
    }


def _explain_threads(limits: CpuLimits, num_threads: int | None) -> str:
    if num_threads is not None:
        excess = limits.explain_excess(num_threads)
        return "asked for by --threads" if excess is None else f"asked for by --threads, and {excess}"
    if limits.quota is None:
        return "the CPUs of the affinity mask; there is no cgroup quota"
    if limits.num_threads < limits.affinity:
        return f"the cgroup quota is {limits.quota:g} CPUs, the affinity mask has {limits.affinity}"
    return f"the CPUs of the affinity mask, within the cgroup quota of {limits.quota:g}"


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
