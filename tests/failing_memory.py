"""Ranks whose memory runs out now and then: in ops, in exchanges before and after they are made, and in sampling."""

import itertools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from headrace.engine import sharded_sampler
from headrace.engine.rank_exchanges import RankExchanges
from headrace.kernels import Kernels, Recording

OPS = (
    "linear",
    "embedding",
    "rms_norm",
    "layer_norm",
    "rotary_store_kv_",
    "add_",
    "attention",
    "attention_share",
    "join_heads",
    "weigh_share",
    "activation",
    "gated_activation",
    "mixture",
)
BEFORE = ("all_gather", "send", "recv_")
"""Exchanges that allocate nothing once they are made."""
AROUND = ("all_reduce", "reduce_scatter")
TEXT = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has 1.00 GiB free."

_PAUSE_STEPS = 8
"""After a step with faults: a request whose step fails twice in a row, while it is alone, ends."""


class Faults:
    """One of `period` calls of a rank's ops fails, ranks in turn, and one of so many exchanges of all ranks."""

    def __init__(self, world_size: int, period: int) -> None:
        self._world_size, self._period = world_size, period
        self._ranks = itertools.count()
        self.is_on = False
        self.step: Callable[[], int] = lambda: 0
        """The number of the step that runs."""
        self._last_step = -_PAUSE_STEPS
        self.num_faults: dict[str, int] = {}
        self._thread = threading.local()

    @contextmanager
    def sparing_reserves(self) -> Iterator[None]:
        """What ranks make with the memory that they had set aside does not fail."""
        complete = RankExchanges.complete

        def with_reserve(*args: Any, **kwargs: Any) -> None:
            self._thread.has_reserve = True
            try:
                complete(*args, **kwargs)
            finally:
                self._thread.has_reserve = False

        RankExchanges.complete = with_reserve
        try:
            yield
        finally:
            RankExchanges.complete = complete

    def kernels(self, kernels: Kernels) -> Kernels:
        """Of one rank, whose decode steps are asked for op by op."""
        fails = self._every(self._world_size * self._period, next(self._ranks) * self._period)
        ops = {name: self._failing_before(f"op {name}", getattr(kernels, name), fails) for name in OPS}
        return replace(kernels, **ops, record=lambda run: (run(), Recording(obstacle="every op is called")))

    @contextmanager
    def in_exchanges(self, group_type: type) -> Iterator[None]:
        fails = self._every(self._period)
        originals = {name: getattr(group_type, name) for name in (*BEFORE, *AROUND)}
        for name, call in originals.items():
            wrapped = self._failing_before(f"before {name}", call, fails)
            if name in AROUND:
                wrapped = self._failing_after(f"after {name}", wrapped, fails)
            setattr(group_type, name, wrapped)
        try:
            yield
        finally:
            for name, call in originals.items():
                setattr(group_type, name, call)

    @contextmanager
    def in_sampling(self) -> Iterator[None]:
        """In what follows the exchange of candidates; what is tried again succeeds."""
        fails = self._every(3, pauses=False)

        class Torch:
            stack = staticmethod(self._failing_before("stack", torch.stack, fails))
            cat = staticmethod(self._failing_before("cat", torch.cat, fails))

            def __getattr__(self, name: str) -> Any:
                return getattr(torch, name)

        sharded_sampler.torch = Torch()
        try:
            yield
        finally:
            sharded_sampler.torch = torch

    def _every(self, period: int, start: int = 0, *, pauses: bool = True) -> Callable[[], bool]:
        """pauses: the step is undone, and some steps after it are spared."""
        numbers, is_overdue = itertools.count(start + 1), False

        def fails() -> bool:
            nonlocal is_overdue
            if not self.is_on or getattr(self._thread, "has_reserve", False):
                return False
            is_due = next(numbers) % period == 0 or is_overdue
            # Those that come too early come with the first call after the pause.
            is_overdue = is_due and pauses and 0 < self.step() - self._last_step < _PAUSE_STEPS
            if is_due and pauses and not is_overdue:
                self._last_step = self.step()
            return is_due and not is_overdue

        return fails

    def _failing_before(self, what: str, call: Callable, fails: Callable[[], bool]) -> Callable:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            if fails():
                self._fail(what)
            return call(*args, **kwargs)

        return wrapped

    def _failing_after(self, what: str, call: Callable, fails: Callable[[], bool]) -> Callable:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            out = call(*args, **kwargs)
            if fails():
                self._fail(what)
            return out

        return wrapped

    def _fail(self, what: str) -> None:
        self.num_faults[what] = self.num_faults.get(what, 0) + 1
        raise torch.OutOfMemoryError(TEXT)
