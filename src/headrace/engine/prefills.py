"""Prompts of a step: passes 2 and 3 of the scheduler. No tensors.

Both passes share one room (`prompt_room`): each prompt gets all it needs as long as that fits. The first that does
not, the long one, gets the rest, but for up to half of it, which goes to short prompts behind it, the shortest first:
those with at most half as many tokens left. So a short prompt need not wait for a long one, and the long one, which is
the oldest as soon as the older ones are done, gets at least half of what is there in every step. Who waits may overtake
others who wait only if all of them could start at once: it takes from them nothing but room for tokens.
"""

from operator import itemgetter

from headrace.cache.block_manager import BlockManager
from headrace.engine.plan import NewSequence
from headrace.engine.prompt_room import PromptRoom
from headrace.engine.queues import Queues
from headrace.engine.sequence import Sequence, SequenceStatus


class Prefills:
    """Gives room for prompt tokens to who runs already, and starts who waits: with blocks for all tokens it has."""

    def __init__(self, queues: Queues, block_manager: BlockManager) -> None:
        self._queues = queues
        self._blocks = block_manager
        self._new: list[NewSequence] = []

    def take_new(self) -> tuple[NewSequence, ...]:
        """Those that have run for the first time since this was last asked."""
        new, self._new = tuple(self._new), []
        return new

    def fill(self, room: PromptRoom, prefilling: list[Sequence], max_num_running: int, updated_step: int) -> None:
        """Give away all the room that somebody has use for.

        prefilling: who runs and is not done with its prompt. max_num_running: nobody starts if so many run.
        updated_step: the last one that has come back.
        """
        behind: list[tuple[int, Sequence]] = []
        for sequence in prefilling:
            if not room.has_long and not room.is_full:
                room.offer(sequence)
            else:
                behind.append((sequence.num_tokens - sequence.num_scheduled_tokens, sequence))
        self._admit_waiting(room, behind, max_num_running, updated_step)
        # Of equals, who arrived first.
        for num_left, sequence in sorted(behind, key=itemgetter(0)):
            if not room.admits(num_left):
                return
            if sequence.status is SequenceStatus.RUNNING:
                room.offer(sequence)
            else:
                self._start(sequence, room)

    def _admit_waiting(
        self, room: PromptRoom, behind: list[tuple[int, Sequence]], max_num_running: int, updated_step: int
    ) -> None:
        """Pass 3, up to a long prompt, and who waits behind it and could start as well, with the tokens each has left:
        in the order of arrival, while slots and blocks last. Nobody overtakes one for whom they do not, or small
        requests would starve a large one."""
        waiting, running = self._queues.waiting, self._queues.running
        index = num_behind = num_behind_blocks = 0
        while index < len(waiting) and len(running) + num_behind < max_num_running and not room.is_full:
            sequence = waiting[index]
            if _waits_for_sibling(sequence):
                index += 1
                continue
            # Found out before the cache is searched, as it may be full and the line long.
            num_reserved_blocks = len(running) + num_behind + num_behind_blocks
            if sequence.last_step > updated_step or self._blocks.num_free_blocks <= num_reserved_blocks:
                return
            shared = self._find_shared_blocks(sequence)
            if not room.has_long:
                if not self._blocks.can_allocate(sequence.num_tokens, shared, num_reserved_blocks):
                    return
                self._start(sequence, room, shared)
                continue
            # As if it shared nothing: what it would share may be gone when its turn comes.
            if not self._blocks.can_allocate(sequence.num_tokens, (), num_reserved_blocks):
                return
            num_behind += 1
            num_behind_blocks += self._blocks.num_blocks_for(sequence.num_tokens)
            index += 1
            behind.append((sequence.num_tokens - len(shared) * self._blocks.block_size, sequence))

    def _start(self, sequence: Sequence, room: PromptRoom, shared: tuple[int, ...] | None = None) -> None:
        """Give a waiting sequence blocks for all its tokens and its first chunk.

        shared: what `_find_shared_blocks` has just said; None asks it.
        """
        if shared is None:
            shared = self._find_shared_blocks(sequence)
        self._queues.start(sequence)
        block_ids = self._blocks.allocate(sequence.seq_id, sequence.num_tokens, shared)
        sequence.num_scheduled_tokens = sequence.num_computed_tokens = len(shared) * self._blocks.block_size
        if not sequence.is_known_to_ranks:
            self._introduce(sequence)
        room.offer(sequence, block_ids, resets_blocks=True)

    def _introduce(self, sequence: Sequence) -> None:
        sequence.is_known_to_ranks = True
        sequence.num_cached_tokens = sequence.num_computed_tokens
        self._new.append(
            NewSequence(
                seq_id=sequence.seq_id,
                prompt_token_ids=sequence.prompt_token_ids,
                params=sequence.params,
                seed=sequence.seed,
                pooling=sequence.pooling,
            )
        )

    def _find_shared_blocks(self, sequence: Sequence) -> tuple[int, ...]:
        """What the cache has, else what the sibling holds; nothing if all of the prompt must be computed.

        The cache has everything that a sibling holds, and perhaps more, unless prefix caching is off.
        """
        if sequence.needs_whole_prompt:
            return ()
        cached = self._blocks.cached_prefix(sequence.tokens, sequence.num_tokens)
        sibling = sequence.forked_from
        if cached or sibling is None or sibling.status is not SequenceStatus.RUNNING:
            return cached
        # At least one token is left to compute, as its logits are not in the cache.
        num_common_tokens = min(sequence.num_prompt_tokens, sequence.num_tokens - 1)
        return self._blocks.forkable_prefix(sibling.seq_id, num_common_tokens)


def _waits_for_sibling(sequence: Sequence) -> bool:
    """Whether the prompt that this sequence repeats is about to be computed by a sibling it can share blocks with."""
    sibling = sequence.forked_from
    return (
        sibling is not None
        and sibling.status is not SequenceStatus.FINISHED
        and sibling.num_computed_tokens < sibling.num_prompt_tokens
        and not sequence.needs_whole_prompt
    )
