"""Running outputs of a step, a token each: pass 1 of the scheduler. No tensors."""

from headrace.cache.block_manager import BlockManager
from headrace.costs.micro_batches import decode_share
from headrace.engine.plan import ScheduledChunk
from headrace.engine.queues import Queues
from headrace.engine.sequence import Sequence


class Decodes:
    """Schedules sequences that have one token left to compute, and finds blocks for them: the newest give up theirs.

    max_in_flight: plans that may be open.
    """

    def __init__(self, queues: Queues, block_manager: BlockManager, max_in_flight: int) -> None:
        self._queues = queues
        self._blocks = block_manager
        self._block_size = block_manager.block_size
        self._max_in_flight = max_in_flight

    def schedule(self, step: int) -> tuple[list[ScheduledChunk], int, list[Sequence]]:
        """Chunks, how many of them are tokens of outputs, and who runs and is not done with its prompt.

        The scheduler's hot path: what it touches of each sequence has left the caches since the last step.

        step: the last one planned.
        """
        chunks: list[ScheduledChunk] = []
        prefilling: list[Sequence] = []
        num_decode_tokens, block_size = 0, self._block_size
        num_free_seqs = len(self._queues.running) if self._max_in_flight == 1 else self._decode_share()
        # Oldest first, while preemption takes from the end: nobody who has a chunk already loses its blocks.
        for sequence in self._queues.running:
            num_tokens = sequence.num_tokens
            start = sequence.num_scheduled_tokens
            if num_tokens - start != 1:
                # Where none is left, the token that follows is on its way.
                if num_tokens > start:
                    prefilling.append(sequence)
                continue
            if not num_free_seqs:
                continue
            new_block_ids = () if start % block_size else self._append_blocks(sequence, step)
            if new_block_ids is None:
                continue
            num_free_seqs -= 1
            sequence.num_scheduled_tokens = num_tokens
            chunks.append(ScheduledChunk(sequence.seq_id, start, 1, new_block_ids, False, sequence.pooling is None))
            # The last token of a prompt may come alone, too.
            if sequence.output_token_ids:
                num_decode_tokens += 1
        return chunks, num_decode_tokens, prefilling

    def has_open(self) -> bool:
        """Whether somebody waits for the next token of an output in a plan that is open."""
        if self._max_in_flight == 1:
            return False
        running = self._queues.running
        return any(s.output_token_ids and s.num_tokens - s.num_scheduled_tokens <= 1 for s in running)

    def _decode_share(self) -> int:
        """How many sequences may decode in the next of several steps at a time."""
        num_decoding = sum([s.num_tokens - s.num_scheduled_tokens <= 1 for s in self._queues.running])
        return decode_share(num_decoding, self._max_in_flight)

    def _append_blocks(self, sequence: Sequence, step: int) -> tuple[int, ...] | None:
        """Those that the sequence needs for the tokens it has. Preempts from the end until there are as many; None if
        that took the sequence itself."""
        while True:
            new_block_ids = self._blocks.try_append(sequence.seq_id, sequence.num_tokens)
            if new_block_ids is not None:
                return new_block_ids
            if self._queues.preempt_last(step) is sequence:
                return None
