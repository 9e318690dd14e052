"""Recorded ops: replayed on new inputs they give what asking for them one by one gives."""

import gc
import subprocess
import sys

import pytest
import torch

from headrace.config import Activation, WeightFormat

cpu = pytest.importorskip("headrace.kernels.cpu", reason="the native module is not built", exc_type=ImportError)


class SmallMlp:
    """norm, up, gated activation, down, added to the input, twice."""

    def __init__(self, weight_format: WeightFormat = WeightFormat.FLOAT32) -> None:
        self.stream = cpu.Stream()
        target = cpu.best_target()
        self.linear = cpu.Linear(target, self.stream)
        self.norm = cpu.Norm(target, self.stream)
        self.activate = cpu.Activate(target, self.stream)
        self.up, self.down = make_weight(weight_format, 64, 32), make_weight(weight_format, 32, 32)
        self.scale = torch.ones(32)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        hidden_states = self.norm.rms_norm(x, self.scale, eps=1e-6)
        for _ in range(2):
            update = self.linear(
                self.activate.gated_activation(self.linear(hidden_states, self.up), Activation.SILU), self.down
            )
            self.norm.add_(hidden_states, update)
        return hidden_states


def make_weight(weight_format: WeightFormat, rows: int, columns: int):
    builder = cpu.make_weight_builder(weight_format, rows, columns)
    builder.write(0, torch.randn(rows, columns))
    return builder.build()


@pytest.mark.parametrize("weight_format", [WeightFormat.FLOAT32, WeightFormat.INT4], ids=lambda f: f.value)
@pytest.mark.parametrize("num_rows", [1, 3, 17])
def test_a_replay_equals_asking_op_by_op(num_rows, weight_format):
    mlp, x = SmallMlp(weight_format), torch.randn(num_rows, 32)
    expected = mlp(x)
    out, recording = mlp.stream.record(lambda: mlp(x))
    assert torch.equal(out, expected), "recording gives the result too"
    assert recording.obstacle is None
    assert recording.num_ops == 9
    for seed in range(3):
        x.copy_(torch.randn(num_rows, 32, generator=torch.Generator().manual_seed(seed)))
        expected = mlp(x.clone())
        out.fill_(torch.nan)
        recording.replay()
        assert torch.equal(out, expected)


def test_joined_replays_do_what_both_do_in_their_order():
    """Of two graphs one is made; a replay that is more than a graph, as one that counts, is called all the same."""
    mlp, x = SmallMlp(), torch.randn(3, 32)
    half_way, first = mlp.stream.record(lambda: mlp(x))
    out, second = mlp.stream.record(lambda: mlp(half_way))
    calls = []

    def counted() -> None:
        calls.append(1)
        second.replay()

    joined = cpu.join_replays(first.replay, second.replay)
    del first
    for replay in (joined, cpu.join_replays(joined, counted)):
        x.copy_(torch.randn(3, 32))
        expected = mlp(mlp(x))
        out.fill_(torch.nan)
        replay()
        assert torch.equal(out, expected)
    assert calls == [1]
    assert cpu.join_replays(second.replay, second.replay).__self__.num_ops == 2 * second.num_ops


def test_recorded_memory_is_reused_within_a_recording_and_between_recordings():
    mlp, x = SmallMlp(), torch.randn(8, 32)
    out, _first = mlp.stream.record(lambda: mlp(x))
    one = mlp.stream.native.arena_bytes
    # The norm, up, activation, and two of down: the last pass's update is still held while the next one is computed.
    num_values = 8 * (32 + 64 + 32 + 32 + 32)
    assert one <= num_values * 4 + 5 * 128, "each buffer once, not once for each pass of the loop"
    del out
    gc.collect()
    _out, _second = mlp.stream.record(lambda: mlp(x))
    assert mlp.stream.native.arena_bytes == one


def test_results_of_two_recordings_do_not_share_memory_while_both_are_held():
    mlp = SmallMlp()
    small, large = torch.randn(1, 32), torch.randn(5, 32)
    small_out, small_recording = mlp.stream.record(lambda: mlp(small))
    large_out, large_recording = mlp.stream.record(lambda: mlp(large))
    expected = mlp(small), mlp(large)
    small_recording.replay()
    large_recording.replay()
    assert torch.equal(small_out, expected[0])
    assert torch.equal(large_out, expected[1])


def test_a_tensor_of_the_arena_outlives_its_stream():
    def view_of_a_recorded_tensor() -> torch.Tensor:
        stream = cpu.Stream()
        out, _ = stream.record(lambda: stream.empty((3, 5), torch.float32).fill_(7.0))
        return out[1:].flatten()

    view = view_of_a_recorded_tensor()
    gc.collect()
    assert view.tolist() == [7.0] * 10


@pytest.mark.parametrize(
    ("compute", "name"),
    [
        (lambda x: x + 1, "aten::add"),
        (lambda x: x.mul_(2), "aten::mul_"),
        (lambda x: x.T.contiguous(), "aten::clone"),
        (lambda x: x[torch.tensor([0])], "aten::index"),
        (lambda x: torch.zeros(3), "aten::zeros"),
    ],
)
def test_arithmetic_of_torch_is_an_obstacle_with_a_name(compute, name):
    """What torch computes between kernels is not recorded: replaying would use stale values in silence."""
    stream, x = cpu.Stream(), torch.ones(2, 2)
    _, recording = stream.record(lambda: compute(x))
    assert recording.replay is None
    assert name in recording.obstacle


def test_conversions_are_an_obstacle_in_inference_mode():
    """Bug: torch says of aten::to, as that mode shows it, that it makes a view, even where it converts."""
    stream = cpu.Stream()
    with torch.inference_mode():
        for x in (torch.ones(3, dtype=torch.int64), torch.ones(3, dtype=torch.bfloat16)):
            assert "aten::to" in stream.record(lambda x=x: x.float())[1].obstacle
        assert stream.record(x.bfloat16)[1].obstacle is None


def test_views_are_no_obstacle():
    stream, x = cpu.Stream(), torch.ones(4, 6)

    def look() -> torch.Tensor:
        first, second = torch.split(x.view(4, 2, 3), [1, 1], dim=1)
        return torch.empty(2) if first is second else second.flatten(1).transpose(0, 1)[1:].unsqueeze(0).detach()

    assert stream.record(look)[1].obstacle is None


def test_a_pass_that_fails_leaves_the_stream_usable():
    mlp, x = SmallMlp(), torch.randn(2, 32)
    with pytest.raises(ZeroDivisionError):
        mlp.stream.record(lambda: (mlp(x), 1 / 0))
    assert not mlp.stream.native.is_capturing
    assert torch.equal(mlp.stream.record(lambda: mlp(x))[0], mlp(x))


def test_recording_does_not_import_the_compiler_of_torch():
    """It once did, which made the first decode step of every process take a second."""
    code = (
        "import sys, torch; from headrace.kernels.cpu import Stream; x = torch.ones(2, 2)\n"
        "Stream().record(lambda: x.view(4)); assert 'torch._dynamo' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
