"""Triton's kernels compile for the GPUs they are meant for, within their shared memory. No GPU is needed."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

from triton_variants import all_variants, representative

SHARED_BYTES_LIMITS = {"sm_90": 227 * 2**10, "sm_80": 163 * 2**10, "gfx942": 64 * 2**10}
"""Of one block."""

NUM_PROCESSES = 2

pytestmark = pytest.mark.timeout(300)  # Triton keeps what it has compiled; the first time takes longer


@pytest.fixture(scope="module")
def reports() -> dict[tuple[str, str], dict[str, Any]]:
    """By variant and target."""
    command = [sys.executable, "-m", "triton_variants"]
    processes = [
        subprocess.Popen(
            [*command, "--part", f"{part}/{NUM_PROCESSES}"],
            cwd=Path(__file__).parent,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for part in range(NUM_PROCESSES)
    ]
    found = {}
    try:
        for process in processes:
            out, errors = process.communicate()
            assert process.returncode == 0, errors
            for report in map(json.loads, out.splitlines()):
                found[report["variant"], report["target"]] = report
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return found


@pytest.mark.parametrize(("name", "target"), representative(all_variants()))
def test_kernel_compiles(reports, name, target):
    report = reports[name, target]
    print({key: value for key, value in report.items() if key not in ("variant", "target")})
    assert "error" not in report, report["error"]
    assert report["shared_bytes"] <= SHARED_BYTES_LIMITS[target]
    if target != "gfx942" and all_variants()[name].instructions:
        assert not report.get("missing")
        assert report.get("stack_bytes", 0) == 0
    if target == "sm_90" and all_variants()[name].most_instructions:
        assert report["instructions_per_weight"] <= all_variants()[name].most_instructions
