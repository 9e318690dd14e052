"""A long-lived engine's memory does not grow with the requests it has served."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_model import write_tiny_model

MAX_GROWTH_BYTES = 512 * 2**10
"""Half a KiB for each of a thousand requests: less than a prompt's token ids, ten times the allocator's own unrest."""


@pytest.fixture(scope="module")
def grown(tmp_path_factory) -> dict[str, int]:
    model = write_tiny_model(tmp_path_factory.mktemp("models") / "tiny")
    program = Path(__file__).with_name("memory_growth.py")
    done = subprocess.run([sys.executable, program, model], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def test_a_thousand_requests_leave_nothing_behind(grown) -> None:
    assert grown["growth_bytes"] < MAX_GROWTH_BYTES


def test_a_leak_would_be_seen(grown) -> None:
    assert grown["leaking_growth_bytes"] > 2 * MAX_GROWTH_BYTES
