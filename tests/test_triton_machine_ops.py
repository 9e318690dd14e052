"""What a GPU does at best: the kernel that reads, and the form of what is measured. No speed is asserted."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from triton_device import DEVICE

from headrace.config import WeightFormat
from headrace.kernels import KernelChoice, resolve_kernels, timing
from headrace.kernels.timing import time_calls
from headrace.kernels.triton import machine_ops


@pytest.mark.parametrize("num_entries", [1, 4095, 4096, 4097, 8 * 4096, 8 * 4096 + 1, 70_001])
def test_scan_reads_every_entry_once(num_entries: int) -> None:
    per_program = machine_ops._BLOCK * machine_ops._BLOCKS_PER_PROGRAM
    # Entries past the end are there, and not to be read.
    memory = torch.randn(num_entries + 5000, device=DEVICE)
    memory[num_entries:] = float("nan")
    out = torch.full((-(-num_entries // per_program),), float("nan"), device=DEVICE)
    machine_ops.scan(memory[:num_entries], out)
    expected = [part.double().sum() for part in memory[:num_entries].split(per_program)]
    torch.testing.assert_close(out.double(), torch.stack(expected), rtol=0, atol=1e-3)


@pytest.mark.parametrize(
    ("weight_format", "name"),
    [(WeightFormat.FLOAT32, "float32"), (WeightFormat.BFLOAT16, "bfloat16"), (WeightFormat.INT4, "bfloat16")],
)
def test_limits_are_of_what_weights_are_multiplied_as(weight_format: WeightFormat, name: str) -> None:
    machine = resolve_kernels(KernelChoice.TRITON, device=DEVICE).machine
    assert isinstance(machine, machine_ops.MachineOps)
    found_name, ops_per_s = machine.multiply_ops_per_s(weight_format)
    assert found_name == name
    assert ops_per_s > 0


def test_read_bandwidth_is_the_better_of_two(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = machine_ops.MachineOps(DEVICE)
    assert machine.scan_bytes_per_s(2**16) > 0
    monkeypatch.setattr(machine_ops.MachineOps, "scan_bytes_per_s", lambda self, buffer_bytes: 3.0 * buffer_bytes)
    monkeypatch.setattr(machine_ops.MachineOps, "copy_bytes_per_s", lambda self, buffer_bytes: 5.0 * buffer_bytes)
    assert machine.read_bytes_per_s(7) == 35.0


def test_copies_are_called_in_turn() -> None:
    calls: list[int] = []
    timed = time_calls([lambda: calls.append(0), lambda: calls.append(1)], torch.device("cpu"))
    assert timed.best_s(min_calls=5, min_s=0.0) >= 0
    assert calls == [0, 1, 0, 1, 0]
    assert not timed.is_captured


class FakeGpu:
    """Stands for torch.cuda: a graph's replay takes 6 ms, and so do calls that are queued one by one."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, can_capture: bool) -> None:
        self.replays = self.records = 0
        gpu = self

        class Graph:
            def replay(self) -> None:
                gpu.replays += 1

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing

            def record(self) -> None:
                gpu.records += 1

            def synchronize(self) -> None: ...

            def elapsed_time(self, end: object) -> float:
                return 6.0

        @contextmanager
        def capturing(_: Graph) -> Iterator[None]:
            if not can_capture:
                raise RuntimeError("operation not permitted when stream is capturing")
            yield

        fakes = {"CUDAGraph": Graph, "Event": Event, "synchronize": lambda *_: None}
        for name, fake in fakes.items():
            monkeypatch.setattr(torch.cuda, name, fake)
        monkeypatch.setattr(timing, "capturing", capturing)


def test_a_graph_takes_the_time_of_all_of_its_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu, calls = FakeGpu(monkeypatch, can_capture=True), []
    timed = time_calls([lambda i=i: calls.append(i) for i in range(5)], torch.device("cuda"))
    # Each once to be compiled, and then as often as makes a graph of 24 or more.
    assert calls == [0, 1, 2, 3, 4] + 5 * [0, 1, 2, 3, 4]
    assert timed.is_captured
    assert timed.best_s(min_calls=30, min_s=0.0) == pytest.approx(6e-3 / 25)
    # The first replay of each measurement keeps the device busy until the second is asked for.
    assert (gpu.replays, gpu.records, len(calls)) == (4, 4, 30)


def test_calls_that_no_graph_takes_are_queued(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu, calls = FakeGpu(monkeypatch, can_capture=False), []
    timed = time_calls([lambda: calls.append(0)], torch.device("cuda"))
    assert not timed.is_captured
    assert timed.best_s(min_calls=1, min_s=0.0) == pytest.approx(6e-3 / 24)
    assert (gpu.replays, len(calls)) == (0, 1 + 2 * 24)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_calls_on_a_gpu_are_captured_and_do_their_work() -> None:
    counters = [torch.zeros(1, device=DEVICE) for _ in range(3)]
    timed = time_calls([lambda counter=counter: counter.add_(1) for counter in counters], DEVICE)
    assert timed.is_captured
    assert timed.best_s(min_calls=1, min_s=0.0) > 0
    assert len({counter.item() for counter in counters}) == 1
    assert counters[0].item() > 8


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_what_cannot_be_captured_is_timed_call_by_call() -> None:
    counter = torch.zeros(1, device=DEVICE)
    timed = time_calls([lambda: counter.add_(1).item()], DEVICE)
    assert not timed.is_captured
    assert timed.best_s(min_calls=1, min_s=0.0) > 0
