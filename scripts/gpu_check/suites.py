"""The tests that a GPU makes worth running: Triton's kernels, compiled instead of interpreted, and those marked gpu."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from scripts.gpu_check.supervisor import ROOT, Say, Settings, end_group

_NUM_PROCESSES = 8
"""Each compiles its kernels; what it needs of the GPU's memory is little."""

_TEST_LIMIT_S = 120
_TAKES_ALL_MEMORY = "TestMemory"
_NOT_ON_A_GPU = {"test_triton_compiles.py", "test_gpu_check.py"}
_DRY_FILE = "test_triton_machine_ops.py"
_NUM_FAILURES_KEPT = 20
_OUTCOME = re.compile(r"\b(PASSED|FAILED|SKIPPED|ERROR)\b")


def run_suites(settings: Settings, limit_s: float, say: Say) -> dict[str, dict[str, Any]]:
    """By name: how many tests passed, failed and were skipped, and what the first failures said."""
    kernels, marked = test_files(ROOT / "tests")
    if settings.is_dry:
        kernels, marked = [file for file in kernels if file.name == _DRY_FILE], []
    start = time.monotonic()
    found = {}
    # Those that take all of a GPU's memory run by themselves.
    alone = [file for file in marked if f"class {_TAKES_ALL_MEMORY}" in file.read_text()]
    for name, files, arguments, share in (
        ("kernels", kernels, [], 0.6),
        ("gpu", marked, ["-m", "gpu", "-k", f"not {_TAKES_ALL_MEMORY}"], 0.8),
        ("memory", alone, ["-m", "gpu", "-k", _TAKES_ALL_MEMORY], 1.0),
    ):
        if files:
            left_s = limit_s - (time.monotonic() - start)
            found[name] = _run(settings, name, files, arguments, share * left_s)
            say(f"tests, {name}: {summary(found[name])}")
    return found


def test_files(folder: Path) -> tuple[list[Path], list[Path]]:
    """Those of Triton's kernels, and others in which tests are marked gpu."""
    files = [file for file in sorted(folder.glob("test_*.py")) if file.name not in _NOT_ON_A_GPU]
    kernels = [file for file in files if file.name.startswith("test_triton_")]
    marked = [file for file in files if file not in kernels and "mark.gpu" in file.read_text()]
    return kernels, marked


def summary(found: dict[str, Any]) -> str:
    counts = ", ".join(f"{found[name]} {name}" for name in ("passed", "failed", "skipped") if found[name])
    return f"{counts or 'no test ran'}{', cut off' if found['is_cut'] else ''} in {found['seconds']:.0f} s"


def _run(settings: Settings, name: str, files: Sequence[Path], arguments: list[str], limit_s: float) -> dict[str, Any]:
    report, log = settings.out / f"tests-{name}.xml", settings.out / f"tests-{name}.log"
    report.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", *arguments, *map(str, files)]
    # Which warnings are errors depends on the versions that the tests are made for.
    command += ["-o", "filterwarnings=default", "-o", "junit_family=xunit2", f"--junitxml={report}"]
    command += ["--continue-on-collection-errors", f"--timeout={_TEST_LIMIT_S}"]
    if not settings.is_dry and name != "memory" and importlib.util.find_spec("xdist") is not None:
        command += ["-n", str(_NUM_PROCESSES)]
    environment = settings.environment()
    for variable in ("HEADRACE_KERNELS", *(["TRITON_INTERPRET"] * (not settings.is_dry))):
        environment.pop(variable, None)
    start, is_cut = time.monotonic(), False
    with log.open("w") as lines:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=lines, stderr=lines, process_group=0)
        try:
            process.wait(max(1.0, limit_s))
        except subprocess.TimeoutExpired:
            is_cut = True
        end_group(process)
    found = _read(report, log)
    return found | {"seconds": time.monotonic() - start, "is_cut": is_cut, "exit_code": process.returncode}


def _read(report: Path, log: Path) -> dict[str, Any]:
    """The report is written at the end; of tests that were cut off the log says how far they came."""
    found: dict[str, Any] = {"passed": 0, "failed": 0, "skipped": 0, "failures": []}
    if not report.exists():
        return found | outcomes(log.read_text(errors="replace"))
    for case in ET.parse(report).getroot().iter("testcase"):
        problem = next((node for node in case if node.tag in ("failure", "error")), None)
        if problem is not None:
            found["failed"] += 1
            if len(found["failures"]) < _NUM_FAILURES_KEPT:
                test = f"{case.get('classname')}::{case.get('name')}"
                found["failures"].append({"test": test, "message": (problem.get("message") or "")[:500]})
        else:
            found["skipped" if case.find("skipped") is not None else "passed"] += 1
    return found


def outcomes(log: str) -> dict[str, Any]:
    """From lines such as `tests/test_a.py::test_b PASSED [ 3%]`, or `[gw0] [ 3%] PASSED tests/test_a.py::test_b`."""
    found = [(match[0], line) for line in log.splitlines() if "::" in line and (match := _OUTCOME.search(line))]
    if not found:
        return {"failures": [{"test": "pytest", "message": log[-1500:]}]}
    failed = [line for outcome, line in found if outcome in ("FAILED", "ERROR")]
    names = [next(word for word in line.split() if "::" in word) for line in failed]
    return {
        "passed": sum(outcome == "PASSED" for outcome, _ in found),
        "failed": len(failed),
        "skipped": sum(outcome == "SKIPPED" for outcome, _ in found),
        "failures": [{"test": name, "message": "see the log"} for name in names[:_NUM_FAILURES_KEPT]],
    }
