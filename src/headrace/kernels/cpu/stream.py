"""The order native ops run in, and the memory of those that are recorded (native/stream.h)."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from headrace import _native
from headrace.kernels.cpu.dtypes import DTYPES
from headrace.kernels.ops import Recording, T, call_in_turn


class Stream:
    """What native ops are launched on. `record` turns a forward pass into one call."""

    def __init__(self) -> None:
        self.native = _native.Stream()

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """An op's output. While recording it comes from the stream's arena, which reuses what has been let go."""
        if not self.native.is_capturing:
            return torch.empty(shape, dtype=dtype)
        out: Tensor = self.native.empty(list(shape), DTYPES[dtype])
        return out

    def record(self, forward: Callable[[], T]) -> tuple[T, Recording]:
        """Run `forward` and record the native ops it launches.

        Its result is at once valid. If torch computed something in between, the recording cannot be replayed and names
        the op that is in the way.
        """
        self.native.begin_capture()
        try:
            with _ComputeDetector() as detector:
                out = forward()
        finally:
            graph = self.native.end_capture()
        if detector.found is None:
            return out, Recording(replay=graph, num_ops=graph.num_ops)
        return out, Recording(obstacle=f"{detector.found} runs in torch between the kernels")


def join_replays(first: Callable[[], None], second: Callable[[], None], /) -> Callable[[], None]:
    """See `JoinReplaysOp`. Two graphs become one: coming back to Python in between costs as much as a small op."""
    if isinstance(first, _native.Graph) and isinstance(second, _native.Graph):
        return first.then(second).launch
    return call_in_turn(first, second)


class _ComputeDetector(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes the first torch op that computes: one that neither allocates nor makes a view."""

    _ALLOCATIONS = frozenset({"aten::empty", "aten::empty_strided", "aten::empty_like", "aten::new_empty"})

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Otherwise the first dispatch imports torch's compiler, which takes a second, only to be kept out of it."""
        return False

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: str | None = None

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        if self.found is None and func._schema.name not in self._ALLOCATIONS and not _is_view(func, args, out):
            self.found = func._schema.name
        return out


def _is_view(func, args, out) -> bool:  # type: ignore[no-untyped-def]
    """torch calls those ops views that may give one, such as aten::to, which copies where it changes the type."""
    if not func.is_view:
        return False
    first = out if isinstance(out, Tensor) else out[0]
    return bool(first.untyped_storage().data_ptr() == args[0].untyped_storage().data_ptr())
