"""Who gets the prompt tokens that one step has room for."""

from headrace.engine.plan import ScheduledChunk
from headrace.engine.sequence import Sequence


class PromptRoom:
    """Room for prompt tokens, given away to sequences that are offered in the order of their arrival.

    Each gets all its tokens as long as they fit. The first whose tokens do not, the long one, gets what is left at the
    end: at least half of what there was when it came. The other half is for short ones, offered after it: each takes
    what it needs and finds, if that is at most half of what the long one has left. Such a one is done, at half speed,
    before it would have had its turn, and by so much earlier that the long one's loss is made up for on average.

    Knows nothing about queues and blocks: who offers a sequence has blocks for it.
    """

    def __init__(self, num_tokens: int) -> None:
        self._num_free_tokens = num_tokens
        self._num_kept_tokens = 0
        """For the long one."""
        self._chunks: list[ScheduledChunk] = []
        self._long: tuple[int, Sequence, tuple[int, ...], bool] | None = None
        """Its place in the batch, and what its chunk will say."""
        self._num_long_tokens = 0

    @property
    def is_full(self) -> bool:
        return self._num_free_tokens == 0

    @property
    def has_long(self) -> bool:
        """Only short ones get any room from now on."""
        return self._long is not None

    def admits(self, num_tokens: int) -> bool:
        """Whether a sequence with so many tokens to compute would get room for any."""
        return not self.is_full and (self._long is None or 2 * num_tokens <= self._num_long_tokens)

    def offer(self, sequence: Sequence, new_block_ids: tuple[int, ...] = (), *, resets_blocks: bool = False) -> None:
        """Take in a sequence that the room admits."""
        num_left = sequence.num_tokens - sequence.num_scheduled_tokens
        if self._long is None and num_left > self._num_free_tokens:
            self._long = len(self._chunks), sequence, new_block_ids, resets_blocks
            self._num_long_tokens = num_left
            num_others = self._num_free_tokens // 2
            self._num_kept_tokens, self._num_free_tokens = self._num_free_tokens - num_others, num_others
            return
        num_tokens = min(num_left, self._num_free_tokens)
        self._num_free_tokens -= num_tokens
        self._chunks.append(_next_chunk(sequence, num_tokens, new_block_ids, resets_blocks))

    def close(self) -> list[ScheduledChunk]:
        """All chunks. Sequences know from now on that they are scheduled."""
        if self._long is not None:
            place, sequence, new_block_ids, resets_blocks = self._long
            num_tokens = self._num_kept_tokens + self._num_free_tokens
            self._chunks.insert(place, _next_chunk(sequence, num_tokens, new_block_ids, resets_blocks))
        return self._chunks


def _next_chunk(
    sequence: Sequence, num_tokens: int, new_block_ids: tuple[int, ...], resets_blocks: bool
) -> ScheduledChunk:
    start = sequence.num_scheduled_tokens
    sequence.num_scheduled_tokens = start + num_tokens
    return ScheduledChunk(
        seq_id=sequence.seq_id,
        start=start,
        num_tokens=num_tokens,
        new_block_ids=new_block_ids,
        resets_blocks=resets_blocks,
        samples=sequence.pooling is None and sequence.num_scheduled_tokens == sequence.num_tokens,
    )
