"""Passes captured as CUDA graphs: what the recorder does around a capture on any machine, and captures on a GPU."""

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

from headrace.kernels.triton.graphs import GraphRecorder

NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


def tensors(value) -> list[torch.Tensor]:
    return [value] if isinstance(value, torch.Tensor) else [x for part in value for x in tensors(part)]


class TestAroundACapture:
    """A capture that queues and computes nothing, replaced by one on the CPU."""

    @pytest.fixture
    def recorder(self, monkeypatch) -> GraphRecorder:
        monkeypatch.setattr(torch.cuda, "CUDAGraph", SimpleNamespace)
        self.error: Exception | None = None

        def capture(recorder, graph, forward):
            if self.error is not None:
                raise self.error
            out = forward()
            for x in tensors(out):
                x.fill_(torch.nan)
            graph.replay = lambda: [a.copy_(b) for a, b in zip(tensors(out), tensors(forward()), strict=True)]
            return out

        monkeypatch.setattr(GraphRecorder, "_capture", capture)
        return GraphRecorder(torch.device("cuda", 0))

    def test_what_it_returns_is_valid_at_once_and_after_each_replay(self, recorder) -> None:
        x, calls = torch.ones(3), []

        def forward():
            calls.append(len(calls))
            return x * 2, (x + 1, x - 1)

        out, recording = recorder.record(forward)
        assert len(calls) == 2
        assert [t.tolist() for t in tensors(out)] == [[2.0] * 3, [2.0] * 3, [0.0] * 3]
        x.fill_(5.0)
        recording.replay()
        assert [t.tolist() for t in tensors(out)] == [[10.0] * 3, [6.0] * 3, [4.0] * 3]

    def test_a_pass_that_cannot_be_captured_is_computed_and_says_why(self, recorder) -> None:
        self.error = RuntimeError("operation not permitted when stream is capturing\nCUDA kernel errors might be ...")
        out, recording = recorder.record(lambda: torch.ones(2) * 3)
        assert out.tolist() == [3.0, 3.0]
        assert recording.replay is None
        assert recording.obstacle == "it cannot be captured: operation not permitted when stream is capturing"

    def test_a_pass_that_fits_while_its_graph_does_not_is_computed_once(self, recorder) -> None:
        """Other ranks that have captured theirs have exchanged what one pass does, and no more."""
        self.error, calls = torch.OutOfMemoryError("CUDA out of memory."), []
        out, recording = recorder.record(lambda: calls.append(1) or torch.ones(2))
        assert out.tolist() == [1.0, 1.0]
        assert calls == [1]
        assert recording.replay is None
        assert recording.obstacle == "the device has no memory left to record it"

    def test_a_pass_that_does_not_fit_fails(self, recorder) -> None:
        def forward():
            raise torch.OutOfMemoryError("CUDA out of memory.")

        with pytest.raises(torch.OutOfMemoryError):
            recorder.record(forward)


@pytest.mark.gpu
@NEEDS_GPU
class TestOnAGpu:
    @pytest.fixture
    def recorder(self) -> GraphRecorder:
        return GraphRecorder(torch.device("cuda", 0))

    def test_a_replay_computes_from_what_lies_there(self, recorder) -> None:
        x = torch.randn(64, 64, device="cuda")
        out, recording = recorder.record(lambda: (x @ x, x.sum(0)))
        torch.testing.assert_close(out[0], x @ x)
        for _ in range(3):
            x.copy_(torch.randn(64, 64))
            recording.replay()
            torch.testing.assert_close(out[0], x @ x)
            torch.testing.assert_close(out[1], x.sum(0))

    def test_results_of_graphs_that_share_a_pool_do_not_overwrite_each_other(self, recorder) -> None:
        x = torch.randn(1000, device="cuda")
        recorded = [recorder.record(lambda i=i: (x * i + 1) * (x - i)) for i in range(8)]
        for i in (5, 0, 7, 3, 5, 1, 2, 6, 4):
            recorded[i][1].replay()
        for i, (out, _) in enumerate(recorded):
            torch.testing.assert_close(out, (x * i + 1) * (x - i))

    @pytest.mark.parametrize(
        "look", [lambda x: x.sum().item(), lambda x: x[x > 0], lambda x: x.cpu(), lambda x: x.tolist()]
    )
    def test_a_look_from_the_host_is_an_obstacle_and_breaks_nothing(self, recorder, look) -> None:
        x = torch.ones(10, device="cuda")

        def forward() -> torch.Tensor:
            y = x + 1
            look(y)
            return y * 2

        out, recording = recorder.record(forward)
        assert recording.replay is None
        assert "it cannot be captured" in recording.obstacle
        assert out.tolist() == [4.0] * 10
        assert torch.cuda.get_sync_debug_mode() == 0
        again, recording = recorder.record(lambda: x * 3)
        assert recording.replay is not None
        assert again.tolist() == [3.0] * 10
