"""What the figures were measured on. No torch is started on the GPU by who asks."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from scripts.gpu_check.supervisor import ROOT, Settings

_PACKAGES = ("torch", "triton", "transformers", "flashinfer-python", "pytest", "numpy", "safetensors")

_PROBE = """
import json, torch
found = {"cuda": torch.version.cuda, "hip": torch.version.hip, "device": None}
if torch.cuda.is_available():
    p = torch.cuda.get_device_properties(0)
    found |= {"device": p.name, "capability": f"{p.major}.{p.minor}", "memory_bytes": p.total_memory,
              "multiprocessors": p.multi_processor_count, "l2_bytes": p.L2_cache_size}
print(json.dumps(found))
"""


def collect(settings: Settings) -> dict[str, Any]:
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": _output("git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"),
        "python": platform.python_version(),
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "packages": {name: _version(name) for name in _PACKAGES},
        "is_dry": settings.is_dry,
        **_device(settings),
    }


def _device(settings: Settings) -> dict[str, Any]:
    if settings.is_dry:
        return {"device": None}
    probe = subprocess.run(
        [sys.executable, "-c", _PROBE],
        check=False,
        env=settings.environment(),
        capture_output=True,
        text=True,
        timeout=120,
    )
    return json.loads(probe.stdout) if probe.returncode == 0 else {"device": None, "error": probe.stderr[-500:]}


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
