"""Exchanges of passes that are recorded once and replayed often: counted at each replay.

A CUDA graph holds the exchanges of the pass it was captured from. Capturing makes the groups' calls without exchanging
anything; a replay exchanges without making a call; passes that warm up before a capture exchange what no plan asks for.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace

from headrace.kernels import Recording
from headrace.kernels.ops import RecordOp, T
from headrace.parallel.exchange_counts import Calls
from headrace.parallel.group import Group


@dataclass(frozen=True, kw_only=True)
class CapturedExchanges:
    """What was called in some groups within `captured`."""

    calls: Sequence[tuple[Group, Calls]]

    def count(self) -> None:
        """The pass has run, in the phase that the groups are in."""
        for group, calls in self.calls:
            if calls:
                group.count(calls)


@contextmanager
def captured(groups: Sequence[Group]) -> Iterator[CapturedExchanges]:
    """Within it the groups' ledgers stay as they are, and what is called is noted in what it yields.

    For passes that no plan asks for it is enough to enter it and forget what it yields.
    """
    with ExitStack() as stack:
        yield CapturedExchanges(calls=[(group, stack.enter_context(group.captured())) for group in groups])


def counting_record(record: RecordOp, groups: Sequence[Group]) -> RecordOp:
    """`record`, but the ledgers of the groups count its first pass once, as far as it came, however often it runs the
    pass to record it, and each replay as much."""
    groups = [group for group in groups if group.world_size > 1]
    if not groups:
        return record

    def record_counted(forward: Callable[[], T]) -> tuple[T, Recording]:
        first: CapturedExchanges | None = None

        def noted() -> T:
            nonlocal first
            with captured(groups) as notes:
                # Those of a capture that fails are not all, and none of them was exchanged.
                first = first or notes
                return forward()

        try:
            out, recording = record(noted)
        finally:
            if first is not None:
                first.count()
        if recording.replay is None:
            return out, recording
        run_again, of_one_pass = recording.replay, first
        assert of_one_pass is not None, "recording a pass runs it"

        def replay() -> None:
            run_again()
            of_one_pass.count()

        return out, replace(recording, replay=replay)

    return record_counted
