"""Which tokens run in the next step. No tensors: a scheduler turns queues and free blocks into plans.

A step has room for `max_num_batched_tokens` tokens of at most `max_num_seqs` sequences, given away in three passes:

1. One token to every running sequence that decodes. They always fit, so no long prompt delays them.
2. Prompt tokens to running sequences whose prompt is not computed yet, oldest first.
3. Prompt tokens to waiting sequences, first come first served.

Passes 2 and 3 share one room (`prompt_room`): each prompt gets all it needs as long as that fits. The first that does
not, the long one, gets the rest, but for up to half of it, which goes to short prompts behind it, the shortest first:
those with at most half as many tokens left. So a short prompt need not wait for a long one, and the long one, which is
the oldest as soon as the older ones are done, gets at least half of what is there in every step. Who waits may overtake
others who wait only if all of them could start at once: it takes from them nothing but room for tokens.

Beside sequences that decode, the room may be limited further (`prompt_limit` of `schedule`), so that their next tokens
do not wait long.

A sequence gets blocks for all tokens it has when it is admitted, so only the first pass ever asks for more. When none
are left, the running sequence that arrived last gives up its own and starts over later. The oldest therefore always
moves on, and `add` refuses what would not fit alone: every request ends.

The stages of a pipeline work at the same time if several plans are in flight, each with sequences that no other one
waits for. The passes then become:

1. A fair share of the sequences that decode (`decode_share`), of those whose last token is known, oldest first.
2. and 3. At most `max_prompt_tokens` prompt tokens, so that even one prompt fills all stages. The next chunk of a
   prompt does not wait for the one before it.

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
from collections.abc import Mapping
from dataclasses import dataclass, field
from operator import attrgetter, itemgetter

from headrace.cache.block_manager import BlockManager
from headrace.config import SchedulerConfig
from headrace.config.checks import check_at_least_one
from headrace.costs.micro_batches import decode_share, max_prompt_tokens
from headrace.engine.plan import NewSequence, ScheduledChunk, StepPlan
from headrace.engine.prompt_room import PromptRoom
from headrace.engine.sequence import FinishReason, Sequence, SequenceStatus
from headrace.engine.size_limits import SizeLimits
from headrace.errors import ConfigError

_PATIENCE_STEPS = 64
"""After so many steps without want of memory one more sequence may run than ran then."""


@dataclass(eq=False, slots=True)
class _Entry:
    """A live sequence and its place in line. The place stays with it through preemptions.

    last_step: that was planned when it was preempted; chunks of its life before are in no later one.
    """

    sequence: Sequence
    arrival: int
    is_known_to_ranks: bool = False
    last_step: int = 0


_by_arrival = attrgetter("arrival")


@dataclass(eq=False, slots=True)
class _Draft:
    """A plan being written. Decodes come first in its batch, then the chunks of a `PromptRoom`."""

    new: list[NewSequence] = field(default_factory=list)
    decodes: list[ScheduledChunk] = field(default_factory=list)
    num_decode_tokens: int = 0
    has_preempted: bool = False


class Scheduler:
    """Queues of sequences, and the plan of each step.

    Owns the order of arrival, the waiting and the running queue and, through the block manager, every block table.
    Writes a sequence's status, counters and output tokens. Knows nothing about tensors, text, stop conditions or
    clients: whoever drives it calls `finish` when a sequence has its last token.

    One step is `plan = schedule()`, then the ranks run the plan, then `update(plan, sampled)`. Between the two,
    sequences may be added and aborted, and up to `max_in_flight` plans may be open; they are updated in the order in
    which they were made. Sequence ids are never used again.

    Invariants:
        Both queues are in order of arrival; only running sequences hold blocks.
        A plan has chunks, or another one is open, as long as a sequence is unfinished.
        A sequence is in at most one open plan that samples it, and in none after that one.
        Ranks hear of a sequence once when it is first scheduled and once when it has left.
    """

    def __init__(self, config: SchedulerConfig, block_manager: BlockManager, max_in_flight: int = 1) -> None:
        check_at_least_one("max_in_flight", max_in_flight)
        if config.max_model_len is None:
            raise ConfigError("max_model_len is None; the scheduler needs the model's length filled in")
        self.limits = SizeLimits(
            max_model_len=config.max_model_len,
            num_blocks=block_manager.num_blocks,
            block_size=block_manager.block_size,
        )
        self._max_num_seqs = self._max_num_running = config.max_num_seqs
        self._num_patient_steps = 0
        self._max_num_batched_tokens = config.max_num_batched_tokens
        self._max_prompt_tokens = max_prompt_tokens(config.max_num_batched_tokens, max_in_flight)
        self._max_in_flight = max_in_flight
        self._blocks = block_manager
        self._entries: dict[int, _Entry] = {}
        self._waiting: list[_Entry] = []
        self._running: list[_Entry] = []
        self._finished: list[int] = []
        self._sampled: list[tuple[int, int]] = []
        self._num_arrived = 0
        self._step = 0
        self._updated_step = 0
        self.num_preemptions = 0

    @property
    def has_unfinished(self) -> bool:
        return bool(self._entries)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        return len(self._running)

    def add(self, sequence: Sequence) -> None:
        """Put a new sequence at the end of the line.

        Raises:
            RequestError: the prompt is empty.
            ContextLengthError: the sequence could not run to its end even alone.
            ValueError: the sequence was added before, or repeats a sibling that was not, or another prompt.
        """
        if sequence.seq_id in self._entries or sequence.status is not SequenceStatus.WAITING:
            raise ValueError(f"sequence {sequence.seq_id} was added before; each output needs its own sequence and id")
        self._check_sibling(sequence)
        self.limits.check_fits(sequence.num_prompt_tokens, sequence.max_tokens)
        entry = _Entry(sequence, self._num_arrived)
        self._num_arrived += 1
        self._entries[sequence.seq_id] = entry
        self._waiting.append(entry)

    def abort(self, seq_id: int) -> None:
        """Drop a sequence in whatever state it is; an unknown id is ignored, as a cancel may cross a request's end."""
        entry = self._entries.get(seq_id)
        if entry is not None:
            self.finish(entry.sequence, FinishReason.ABORT)

    def finish(self, sequence: Sequence, reason: FinishReason) -> None:
        """Take a sequence out and free its blocks. One that has finished keeps its first reason.

        Raises:
            KeyError: the sequence was never added.
        """
        if sequence.status is SequenceStatus.FINISHED:
            return
        entry = self._entries.pop(sequence.seq_id)
        if sequence.status is SequenceStatus.RUNNING:
            _remove(self._running, entry)
            self._blocks.free(sequence.seq_id)
        else:
            _remove(self._waiting, entry)
        sequence.status = SequenceStatus.FINISHED
        sequence.finish_reason = reason
        if entry.is_known_to_ranks:
            self._finished.append(sequence.seq_id)

    def schedule(self, prompt_limit: int | None = None) -> StepPlan | None:
        """Plan the next step. Without unfinished sequences it has no chunks, but may still report finished ones.

        None if all there is to do waits for plans that are open.

        prompt_limit: of prompt tokens, at least 1, if a sequence decodes; None is no limit.

        Raises:
            RuntimeError: an `update` of max_in_flight plans is missing, or a sequence outgrew what `add` allowed it.
        """
        num_in_flight = self._step - self._updated_step
        if num_in_flight == self._max_in_flight:
            raise RuntimeError(
                f"step {self._updated_step + 1} was planned but not updated; call update() before schedule()"
            )
        draft = _Draft()
        prefilling = self._schedule_decodes(draft)
        chunks = draft.decodes
        if prefilling or self._waiting:
            room = PromptRoom(self._num_prompt_tokens(draft, prompt_limit))
            self._schedule_prompts(prefilling, draft, room)
            chunks = [*chunks, *room.close()]
        if num_in_flight and not chunks:
            return None
        self._step += 1
        plan = StepPlan(
            step=self._step,
            sampled=tuple([token for token in self._sampled if token[0] in self._entries]),
            new=tuple(draft.new),
            finished=tuple(self._finished),
            chunks=tuple(chunks),
            num_decode_tokens=draft.num_decode_tokens,
        )
        self._finished.clear()
        self._sampled.clear()
        if not chunks:
            self._check_progress()
            self._updated_step = self._step
        return plan

    def update(self, plan: StepPlan, sampled: Mapping[int, int]) -> None:
        """Record that the ranks ran a plan: tokens computed, blocks filled, a sampled token where a chunk asked for it.

        sampled: token id by sequence id; those of sequences that left meanwhile are ignored.

        Raises:
            ValueError: an earlier plan has not been updated.
            KeyError: the token of a live sequence is missing.
        """
        if plan.chunks and plan.step != self._updated_step + 1:
            raise ValueError(f"step {plan.step} was updated, but step {self._updated_step + 1} is the oldest open one")
        self._updated_step = plan.step
        if self._max_num_running < self._max_num_seqs:
            self._take_heart()
        for chunk in plan.chunks:
            entry = self._entries.get(chunk.seq_id)
            if entry is None:
                continue
            sequence = entry.sequence
            if chunk.samples:
                token_id = sampled[chunk.seq_id]
                sequence.output_token_ids.append(token_id)
                self._sampled.append((chunk.seq_id, token_id))
            if sequence.status is SequenceStatus.WAITING:
                # Preempted since: the blocks are gone.
                continue
            sequence.num_computed_tokens = chunk.start + chunk.num_tokens
            self._blocks.commit(chunk.seq_id, sequence.tokens, sequence.num_computed_tokens)

    def undo(self, plans: list[StepPlan]) -> None:
        """Record that all open plans, in the order in which they were made, are as if they had not been run: their
        tokens are still to be computed. What they say of sequences and their blocks is known to the ranks."""
        self._updated_step = self._step
        for plan in reversed(plans):
            for chunk in plan.chunks:
                entry = self._entries.get(chunk.seq_id)
                # One that was preempted since starts over.
                if entry is not None and entry.sequence.status is SequenceStatus.RUNNING:
                    entry.sequence.num_scheduled_tokens = chunk.start

    def preempt_newest(self) -> bool:
        """Take the blocks of the running sequence that arrived last, and let fewer run together for some time, as steps
        of so many do not fit the device. False if only one is running: nobody could make room for it."""
        if len(self._running) < 2:
            return False
        self._preempt(self._running.pop())
        self._max_num_running, self._num_patient_steps = len(self._running), 0
        return True

    @property
    def oldest_running(self) -> Sequence:
        return self._running[0].sequence

    def _take_heart(self) -> None:
        """A step did fit."""
        self._num_patient_steps += 1
        if self._num_patient_steps == _PATIENCE_STEPS:
            self._max_num_running, self._num_patient_steps = self._max_num_running + 1, 0

    def _check_sibling(self, sequence: Sequence) -> None:
        sibling = sequence.forked_from
        if sibling is None:
            return
        if sibling.prompt_token_ids != sequence.prompt_token_ids:
            raise ValueError(f"sequence {sequence.seq_id} is forked from {sibling.seq_id}, whose prompt is another")
        if sibling.status is not SequenceStatus.FINISHED and sibling.seq_id not in self._entries:
            raise ValueError(f"sequence {sequence.seq_id} is forked from {sibling.seq_id}; add that one first")

    def _schedule_decodes(self, draft: _Draft) -> list[_Entry]:
        """Pass 1; returns who runs and is not done with its prompt. The loop is the scheduler's hot path: a few
        microseconds per sequence."""
        prefilling: list[_Entry] = []
        num_free_seqs = len(self._running) if self._max_in_flight == 1 else self._decode_share()
        index = 0
        # Oldest first, while preemption takes from the end: nobody who has a chunk already loses its blocks.
        while index < len(self._running):
            entry = self._running[index]
            index += 1
            sequence = entry.sequence
            num_tokens = sequence.num_tokens
            num_left = num_tokens - sequence.num_scheduled_tokens
            if num_left != 1:
                # Where none is left, the token that follows is on its way.
                if num_left:
                    prefilling.append(entry)
                continue
            if not num_free_seqs:
                continue
            new_block_ids = self._blocks.try_append(sequence.seq_id, num_tokens)
            if new_block_ids is None:
                new_block_ids = self._make_room(entry, num_tokens, draft)
            if new_block_ids is None:
                continue
            num_free_seqs -= 1
            sequence.num_scheduled_tokens = num_tokens
            draft.decodes.append(
                # By position: names would cost a seventh of the loop.
                ScheduledChunk(sequence.seq_id, num_tokens - 1, 1, new_block_ids, False, sequence.pooling is None)
            )
            # The last token of a prompt may come alone, too.
            draft.num_decode_tokens += num_tokens > sequence.num_prompt_tokens
        return prefilling

    def _num_prompt_tokens(self, draft: _Draft, prompt_limit: int | None) -> int:
        """The room of passes 2 and 3."""
        num_tokens = min(self._max_num_batched_tokens - len(draft.decodes), self._max_prompt_tokens)
        if prompt_limit is None or not self._has_decodes(draft):
            return num_tokens
        return min(num_tokens, prompt_limit)

    def _has_decodes(self, draft: _Draft) -> bool:
        """Whether somebody waits for the next token of an output, in this plan or in one that is open."""
        if draft.num_decode_tokens or self._max_in_flight == 1:
            return draft.num_decode_tokens > 0
        sequences = [entry.sequence for entry in self._running]
        return any(s.output_token_ids and s.num_tokens - s.num_scheduled_tokens <= 1 for s in sequences)

    def _decode_share(self) -> int:
        """How many sequences may decode in the next of several steps at a time."""
        sequences = [entry.sequence for entry in self._running]
        num_decoding = sum([sequence.num_tokens - sequence.num_scheduled_tokens <= 1 for sequence in sequences])
        return decode_share(num_decoding, self._max_in_flight)

    def _make_room(self, entry: _Entry, num_tokens: int, draft: _Draft) -> tuple[int, ...] | None:
        """Preempts from the end until there are blocks for num_tokens tokens in all; None if that took the sequence
        itself."""
        draft.has_preempted = True
        while (victim := self._running.pop()) is not entry:
            self._preempt(victim)
            new_block_ids = self._blocks.try_append(entry.sequence.seq_id, num_tokens)
            if new_block_ids is not None:
                return new_block_ids
        self._preempt(entry)
        return None

    def _preempt(self, entry: _Entry) -> None:
        """Back to the waiting line, before everyone who arrived later. Its tokens are kept and computed again."""
        sequence = entry.sequence
        self._blocks.free(sequence.seq_id)
        sequence.status = SequenceStatus.WAITING
        sequence.num_scheduled_tokens = sequence.num_computed_tokens = 0
        sequence.num_preemptions += 1
        entry.last_step = self._step
        self.num_preemptions += 1
        insort(self._waiting, entry, key=_by_arrival)

    def _schedule_prompts(self, prefilling: list[_Entry], draft: _Draft, room: PromptRoom) -> None:
        """Passes 2 and 3."""
        behind: list[tuple[int, _Entry]] = []
        for entry in prefilling:
            sequence = entry.sequence
            if not room.has_long and not room.is_full:
                room.offer(sequence)
            else:
                behind.append((sequence.num_tokens - sequence.num_scheduled_tokens, entry))
        # Blocks that a preemption has just freed go to those who still run, not to a newcomer that would go next.
        if not draft.has_preempted:
            self._admit_waiting(draft, room, behind)
        # Of equals, who arrived first.
        for num_left, entry in sorted(behind, key=itemgetter(0)):
            if not room.admits(num_left):
                return
            if entry.sequence.status is SequenceStatus.RUNNING:
                room.offer(entry.sequence)
            else:
                self._start(entry, draft, room)

    def _admit_waiting(self, draft: _Draft, room: PromptRoom, behind: list[tuple[int, _Entry]]) -> None:
        """Pass 3, up to a long prompt, and who waits behind it and could start as well, with the tokens each has left:
        in the order of arrival, while slots and blocks last. Nobody overtakes one for whom they do not, or small
        requests would starve a large one."""
        index = num_behind = num_behind_blocks = 0
        while (
            index < len(self._waiting) and len(self._running) + num_behind < self._max_num_running and not room.is_full
        ):
            entry = self._waiting[index]
            sequence = entry.sequence
            if _waits_for_sibling(sequence):
                index += 1
                continue
            # Found out before the cache is searched, as it may be full and the line long.
            num_reserved_blocks = len(self._running) + num_behind + num_behind_blocks
            if entry.last_step > self._updated_step or self._blocks.num_free_blocks <= num_reserved_blocks:
                return
            shared = self._find_shared_blocks(sequence)
            if not room.has_long:
                if not self._blocks.can_allocate(sequence.num_tokens, shared, num_reserved_blocks):
                    return
                self._start(entry, draft, room, shared)
                continue
            # As if it shared nothing: what it would share may be gone when its turn comes.
            if not self._blocks.can_allocate(sequence.num_tokens, (), num_reserved_blocks):
                return
            num_behind += 1
            num_behind_blocks += self._blocks.num_blocks_for(sequence.num_tokens)
            index += 1
            behind.append((sequence.num_tokens - len(shared) * self._blocks.block_size, entry))

    def _start(self, entry: _Entry, draft: _Draft, room: PromptRoom, shared: tuple[int, ...] | None = None) -> None:
        """Give a waiting sequence blocks for all its tokens and its first chunk.

        shared: what `_find_shared_blocks` has just said; None asks it.
        """
        sequence = entry.sequence
        if shared is None:
            shared = self._find_shared_blocks(sequence)
        _remove(self._waiting, entry)
        insort(self._running, entry, key=_by_arrival)
        block_ids = self._blocks.allocate(sequence.seq_id, sequence.num_tokens, shared)
        sequence.status = SequenceStatus.RUNNING
        sequence.num_scheduled_tokens = sequence.num_computed_tokens = len(shared) * self._blocks.block_size
        if not entry.is_known_to_ranks:
            self._introduce(entry, draft)
        room.offer(sequence, block_ids, resets_blocks=True)

    def _introduce(self, entry: _Entry, draft: _Draft) -> None:
        sequence = entry.sequence
        entry.is_known_to_ranks = True
        sequence.num_cached_tokens = sequence.num_computed_tokens
        draft.new.append(
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

    def _check_progress(self) -> None:
        """An empty plan with sequences left and nothing in flight would repeat for ever: an error is better than a
        hang."""
        if self._entries:
            seq_id = min(self._entries.values(), key=_by_arrival).sequence.seq_id
            raise RuntimeError(
                f"nothing can be scheduled though {len(self._entries)} sequences are unfinished; sequence {seq_id} "
                "outgrew what add() allowed it: finish() it at max_tokens and max_model_len"
            )


def _waits_for_sibling(sequence: Sequence) -> bool:
    """Whether the prompt that this sequence repeats is about to be computed by a sibling it can share blocks with."""
    sibling = sequence.forked_from
    return (
        sibling is not None
        and sibling.status is not SequenceStatus.FINISHED
        and sibling.num_computed_tokens < sibling.num_prompt_tokens
        and not sequence.needs_whole_prompt
    )


def _remove(queue: list[_Entry], entry: _Entry) -> None:
    del queue[bisect_left(queue, entry.arrival, key=_by_arrival)]
