"""Who waits, who runs, and who goes back to waiting. No tensors.

Blocks change hands while plans that use them are in flight, which needs no waiting: every rank runs every plan after
the one before it, so all that an earlier plan reads and writes is done when a later one starts.

-  Freed blocks (a sequence finished, aborted or preempted in flight) may be given away in the next plan. What the
   earlier plan still writes to them is overwritten: a sequence writes every slot of its blocks before it reads it.
-  A block becomes findable by others once the plan that fills it has come back, if its sequence still holds it then. It
   is full from then on and nobody writes to it, so those who share it read what was published.
-  A preempted sequence is not admitted again before all plans of its former life have come back, so a chunk that comes
   back belongs to the blocks that its sequence holds, or to none. The token it brings is kept.
"""

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

    def check_new(self, sequence: Sequence) -> None:
        """
        Raises:
            ValueError: the sequence was added before, or repeats a sibling that was not, or another prompt.
        """
        if sequence.seq_id in self.live or sequence.status is not SequenceStatus.WAITING:
            raise ValueError(f"sequence {sequence.seq_id} was added before; each output needs its own sequence and id")
        sibling = sequence.forked_from
        if sibling is None:
            return
        if sibling.prompt_token_ids != sequence.prompt_token_ids:
            raise ValueError(f"sequence {sequence.seq_id} is forked from {sibling.seq_id}, whose prompt is another")
        if sibling.status is not SequenceStatus.FINISHED and sibling.seq_id not in self.live:
            raise ValueError(f"sequence {sequence.seq_id} is forked from {sibling.seq_id}; add that one first")

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
