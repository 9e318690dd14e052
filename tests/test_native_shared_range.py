"""The range that threads share out among themselves, in a program of its own under ThreadSanitizer."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
COMPILER = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")


@pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler")
@pytest.mark.parametrize("flags", [["-O2"], ["-O1", "-fsanitize=thread"]], ids=["plain", "thread sanitizer"])
def test_every_item_is_taken_once(tmp_path: Path, flags: list[str]) -> None:
    program = str(tmp_path / "shared_range")
    sources = [str(ROOT / source) for source in ("tests/native/shared_range.cc", "native/shared_range.cc")]
    command = [str(COMPILER), "-std=c++17", *flags, "-pthread", f"-I{ROOT / 'native'}", *sources, "-o", program]
    compiled = subprocess.run(command, check=False, capture_output=True, text=True)
    if "-fsanitize=thread" in flags and "tsan" in compiled.stderr:
        pytest.skip("the compiler has no ThreadSanitizer")
    assert compiled.returncode == 0, compiled.stderr
    run = subprocess.run([program], check=False, capture_output=True, text=True, timeout=120)
    if "unexpected memory mapping" in run.stderr:
        pytest.skip("ThreadSanitizer does not run on this kernel")
    assert run.returncode == 0, run.stdout + run.stderr
