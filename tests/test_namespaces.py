"""Ranks on hosts of their own, played by network namespaces: what their interfaces send is what was predicted."""

import signal
import subprocess
import sys

import pytest

pytest.importorskip("headrace._native", reason="the native module is not built", exc_type=ImportError)
pytest.importorskip("mpi4py", reason="mpi4py is not installed")

from scripts.namespaces.mpi import why_not
from scripts.namespaces.network import CommandError, network
from scripts.namespaces.random_model import write_random_model
from scripts.namespaces.wire import measure_layout, measure_operations

_REASON = why_not()
pytestmark = pytest.mark.skipif(_REASON is not None, reason=str(_REASON))

MAX_RATIO = 1.08
MAX_RATIO_OF_SMALL = 1.2
"""Of messages of 1 KiB, as which a row of 4 KiB goes in two shots between four ranks."""
SMALLEST_BYTES = 4096


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_random_model(tmp_path_factory.mktemp("random"))


def assert_the_wire_agrees(lines):
    for line in lines:
        is_small = line.layout == "TP 4, PP 1" and line.work == "decode, 100 tokens"
        assert line.counted_bytes == line.predicted_bytes, line
        if line.predicted_bytes:
            assert 1 < line.ratio < (MAX_RATIO_OF_SMALL if is_small else MAX_RATIO), line
        else:
            # Acknowledgements of what the other ranks have sent.
            most_bytes = max(other.predicted_bytes for other in lines if other.work == line.work)
            assert 0 <= line.data_bytes < (MAX_RATIO - 1) * most_bytes, line
        # A plan or a result for each of at most 101 steps, and acknowledgements.
        num_others = max(other.rank for other in lines)
        assert 0 < line.sent.control_bytes < 101 * 300 * num_others, line


@pytest.mark.parametrize(("tensor_parallel_size", "pipeline_parallel_size"), [(4, 1), (2, 2)])
def test_a_models_messages(model, tensor_parallel_size, pipeline_parallel_size):
    lines = measure_layout(model, tensor_parallel_size, pipeline_parallel_size)
    assert {line.rank for line in lines} == set(range(tensor_parallel_size * pipeline_parallel_size))
    assert_the_wire_agrees(lines)


def test_operations():
    lines = measure_operations(2, smallest_bytes=SMALLEST_BYTES)
    assert {line.work.split()[2].rstrip(",") for line in lines} == {"all_reduce", "all_gather", "send"}
    assert_the_wire_agrees(lines)


def namespaces():
    listed = subprocess.run(["ip", "netns", "list"], check=True, capture_output=True, text=True).stdout
    return {line.split()[0] for line in listed.splitlines()}


def test_a_network_limits_and_is_gone_afterwards():
    with network(2, 8) as hosts:
        assert set(hosts.namespaces) < namespaces()
        bucket = subprocess.run(
            ["tc", "-n", hosts.namespaces[1], "qdisc"], check=True, capture_output=True, text=True
        ).stdout
        assert "tbf" in bucket
        assert "rate 8Mbit" in bucket
    assert not namespaces() & set(hosts.namespaces)


def test_a_network_that_cannot_be_made_leaves_nothing():
    before = namespaces()
    with pytest.raises(CommandError, match="tbf"), network(2, 10**30):
        raise AssertionError("there is no such rate")
    assert namespaces() == before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_nothing_is_left_of_a_program_that_is_ended(number):
    command = [sys.executable, "-m", "scripts.namespaces", "--", "sh", "-c", "echo begun; exec sleep 60"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as program:
        assert program.stdout.readline() == "begun\n"
        of_program = {name for name in namespaces() if name.startswith(f"headrace-{program.pid}-")}
        assert len(of_program) == 3
        program.send_signal(number)
        assert program.wait(10) == 130
    assert not namespaces() & of_program


def test_what_a_killed_program_leaves_the_next_one_removes():
    command = [sys.executable, "-m", "scripts.namespaces", "--", "sh", "-c", "echo begun; exec sleep 60"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as program:
        assert program.stdout.readline() == "begun\n"
        program.kill()
    left = {name for name in namespaces() if name.startswith(f"headrace-{program.pid}-")}
    assert left
    with network(1):
        pass
    assert not namespaces() & left
