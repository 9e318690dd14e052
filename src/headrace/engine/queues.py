"""Who waits, who runs, and who goes back to waiting. No tensors."""

from bisect import bisect_left, insort
from operator import attrgetter

from headrace.cache.block_manager import BlockManager
from headrace.engine.sequence import Sequence, SequenceStatus

_by_arrival = attrgetter("arrival")


class Queues:
    """Unfinished sequences. Writes a sequence's status and its place in line.

    Invariants:
        A sequence waits or runs, and nothing else is `live`. Both queues are in order of arrival.
        Only running sequences hold blocks.
    """

    def __init__(self, block_manager: BlockManager) -> None:
        self.live: dict[int, Sequence] = {}
        """By sequence id."""
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self.num_preemptions = 0
        self._blocks = block_manager
        self._num_arrived = 0

    @property
    def oldest(self) -> Sequence | None:
        return min(self.live.values(), key=_by_arrival, default=None)

    def add(self, sequence: Sequence) -> None:
        """To the end of the line."""
        sequence.arrival = self._num_arrived
        self._num_arrived += 1
        self.live[sequence.seq_id] = sequence
        self.waiting.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """It has finished, and its blocks are free.

        Raises:
            KeyError: the sequence was never added.
        """
        del self.live[sequence.seq_id]
        if sequence.status is SequenceStatus.RUNNING:
            _remove(self.running, sequence)
            self._blocks.free(sequence.seq_id)
        else:
            _remove(self.waiting, sequence)
        sequence.status = SequenceStatus.FINISHED

    def start(self, sequence: Sequence) -> None:
        """It waits no more; who calls this gives it blocks."""
        _remove(self.waiting, sequence)
        insort(self.running, sequence, key=_by_arrival)
        sequence.status = SequenceStatus.RUNNING

    def preempt_last(self, step: int) -> Sequence:
        """Who runs and arrived last goes back to the waiting line, before everyone who arrived later. Its tokens are
        kept and computed again.

        step: the last one planned.
        """
        sequence = self.running.pop()
        self._blocks.free(sequence.seq_id)
        sequence.status = SequenceStatus.WAITING
        sequence.num_scheduled_tokens = sequence.num_computed_tokens = 0
        sequence.num_preemptions += 1
        sequence.last_step = step
        self.num_preemptions += 1
        insort(self.waiting, sequence, key=_by_arrival)
        return sequence


def _remove(queue: list[Sequence], sequence: Sequence) -> None:
    del queue[bisect_left(queue, sequence.arrival, key=_by_arrival)]
