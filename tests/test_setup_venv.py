"""scripts/setup_venv.py: how far an installation has come, and what is left of one that fails."""

import contextlib
import io
import os
import pty
import sys
from pathlib import Path

import pytest

from scripts import setup_venv
from scripts.setup_venv import ProgressLine, main, run_logged, stage_of


@pytest.mark.parametrize(
    ("line", "stage"),
    [
        ("Requirement already satisfied: numpy<3,>=1.26 in /x", "found numpy<3,>=1.26"),
        ("Collecting torch<2.14,>=2.11 (from headrace==0.1.0)", "asking for torch<2.14,>=2.11"),
        ("  Downloading torch-2.13.0-cp311-cp311-linux_x86_64.whl (899.8 MB)", "downloading torch-2.13.0-cp311-cp311"),
        ("  Downloading https://x.org/ab/sympy-1.14.0-py3-none-any.whl (6.3 MB)", "downloading sympy-1.14.0-py3-none"),
        ("  Downloading https://x.org/ab/sympy-1.14.0-py3-none-any.whl.metadata (12 kB)", None),
        (
            "  [7/84] Building CXX object CMakeFiles/headrace_avx2.dir/native/linear_target.cc.o",
            "compiling the kernels",
        ),
        ("  [84/84] Linking CXX shared module _native.so", "linking the kernels"),
        ("Installing collected packages: torch, headrace", "installing what was downloaded"),
        ("  native/linear.cc:3:1: error: expected unqualified-id", None),
    ],
)
def test_lines_of_pip_and_ninja_say_what_is_being_done(line: str, stage: str | None) -> None:
    said = stage_of(line)
    assert said == stage if stage is None else said is not None and said.startswith(stage)
    assert stage_of("  [7/84] Building CXX object x.o") == "compiling the kernels, 7 of 84"


def test_a_log_has_every_line_and_the_caller_the_exit_code() -> None:
    script = "import sys; print('Collecting x\\n\\ntext\\xe9 without an end', end=''); sys.exit(3)"
    log, shown = io.StringIO(), io.StringIO()
    code = run_logged([sys.executable, "-X", "utf8", "-c", script], log, ProgressLine(shown, every_s=0))
    assert code == 3
    assert log.getvalue().splitlines()[1:] == ["Collecting x", "", "texté without an end"]
    assert set(shown.getvalue().splitlines()) == {"0:00 asking for x"}


def test_a_terminal_shows_one_line_that_fits() -> None:
    """Everything is read after the last line: a read in between found what the terminal had come to, once one line."""
    ours, theirs = pty.openpty()
    with os.fdopen(theirs, "w") as terminal:
        progress = ProgressLine(terminal)
        progress.tell("installing " + "x" * 300)
        progress.tell(None)
        progress.end("set up")
    shown = b""
    with contextlib.suppress(OSError):  # how reading from a terminal ends
        while part := os.read(ours, 4096):
            shown += part
    os.close(ours)
    lines = shown.decode().split("\r\x1b[2K")[1:]
    assert len(lines) == 3
    assert lines[0] == lines[1]
    assert len(lines[0]) == 79
    assert lines[2] == "0:00 set up\r\n"


def test_a_failure_stops_and_shows_the_end_of_the_log(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    fails = "import sys; print(*range(100), 'native/linear.cc:3: error', sep='\\n'); sys.exit(1)"
    never = f"open({str(tmp_path / 'never')!r}, 'w')"
    commands = [[sys.executable, "-c", script] for script in ("print('first')", fails, never)]
    monkeypatch.setattr(setup_venv, "commands", lambda targets: iter(commands))
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    assert main(["."]) == 1
    shown = capfd.readouterr().err.splitlines()
    assert shown[-2] == "native/linear.cc:3: error"
    assert shown[-1].endswith(f" setting up failed; {tmp_path / 'setup.log'} has everything")
    assert "60" not in shown and "61" in shown
    assert "first" in (tmp_path / "setup.log").read_text("utf-8").splitlines()
    assert not (tmp_path / "never").exists()
