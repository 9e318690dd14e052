"""Which tokens run in the next step. No tensors: a scheduler turns queues and free blocks into plans.

A step has room for `max_num_batched_tokens` tokens of at most `max_num_seqs` sequences, given away in three passes:

1. One token to every running sequence that decodes. They always fit, so no long prompt delays them.
2. Prompt tokens to running sequences whose prompt is not computed yet, oldest first.
3. Prompt tokens to waiting sequences, first come first served (`prefills`).

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

Blocks change hands while plans that use them are in flight (`queues`).
"""

from collections.abc import Mapping

from headrace.cache.block_manager import BlockManager
from headrace.config import SchedulerConfig
from headrace.config.checks import check_at_least_one
from headrace.costs.micro_batches import max_prompt_tokens
from headrace.engine.decodes import Decodes
from headrace.engine.plan import NewSequence, StepPlan
from headrace.engine.prefills import Prefills
from headrace.engine.prompt_room import PromptRoom
from headrace.engine.queues import Queues
from headrace.engine.sequence import FinishReason, Sequence, SequenceStatus
from headrace.engine.size_limits import SizeLimits
from headrace.errors import ConfigError

_PATIENCE_STEPS = 64
"""After so many steps without want of memory one more sequence may run than ran then."""


class Scheduler:
    """Queues of sequences, and the plan of each step.

    Owns the queues and, through the block manager, every block table. Writes a sequence's counters and output tokens.
    Knows nothing about tensors, text, stop conditions or clients: whoever drives it calls `finish` when a sequence has
    its last token.

    One step is `plan = schedule()`, then the ranks run the plan, then `update(plan, sampled)`. Between the two,
    sequences may be added and aborted, and up to `max_in_flight` plans may be open; they are updated in the order in
    which they were made. Sequence ids are never used again.

    Invariants:
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
        self._queues = Queues(block_manager)
        self._decodes = Decodes(self._queues, block_manager, max_in_flight)
        self._prefills = Prefills(self._queues, block_manager)
        self._finished: list[int] = []
        self._sampled: list[tuple[int, int]] = []
        self._step = self._updated_step = 0

    @property
    def has_unfinished(self) -> bool:
        return bool(self._queues.live)

    @property
    def num_waiting(self) -> int:
        return len(self._queues.waiting)

    @property
    def num_running(self) -> int:
        return len(self._queues.running)

    @property
    def num_preemptions(self) -> int:
        return self._queues.num_preemptions

    @property
    def oldest_running(self) -> Sequence:
        return self._queues.running[0]

    def add(self, sequence: Sequence) -> None:
        """Put a new sequence at the end of the line.

        Raises:
            RequestError: the prompt is empty.
            ContextLengthError: the sequence could not run to its end even alone.
            ValueError: the sequence was added before, or repeats a sibling that was not, or another prompt.
        """
        self._queues.check_new(sequence)
        self.limits.check_fits(sequence.num_prompt_tokens, sequence.max_tokens)
        self._queues.add(sequence)

    def abort(self, seq_id: int) -> None:
        """Drop a sequence in whatever state it is; an unknown id is ignored, as a cancel may cross a request's end."""
        sequence = self._queues.live.get(seq_id)
        if sequence is not None:
            self.finish(sequence, FinishReason.ABORT)

    def finish(self, sequence: Sequence, reason: FinishReason) -> None:
        """Take a sequence out and free its blocks. One that has finished keeps its first reason.

        Raises:
            KeyError: the sequence was never added.
        """
        if sequence.status is SequenceStatus.FINISHED:
            return
        self._queues.remove(sequence)
        sequence.finish_reason = reason
        if sequence.is_known_to_ranks:
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
        queues, num_preemptions = self._queues, self._queues.num_preemptions
        new: tuple[NewSequence, ...] = ()
        chunks, num_decode_tokens, prefilling = self._decodes.schedule(self._step)
        if prefilling or queues.waiting:
            room = PromptRoom(self._num_prompt_tokens(len(chunks), num_decode_tokens, prompt_limit))
            # Blocks that a preemption has just freed go to those who still run, not to a newcomer that would go next.
            max_num_running = self._max_num_running if queues.num_preemptions == num_preemptions else 0
            self._prefills.fill(room, prefilling, max_num_running, self._updated_step)
            chunks += room.close()
            new = self._prefills.take_new()
        if num_in_flight and not chunks:
            return None
        self._step += 1
        plan = StepPlan(self._step, self._take_sampled(), new, tuple(self._finished), tuple(chunks), num_decode_tokens)
        self._finished.clear()
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
        live, block_size = self._queues.live, self._blocks.block_size
        for seq_id, start, num_tokens, _, _, samples in plan.chunks:
            sequence = live.get(seq_id)
            if sequence is None:
                continue
            if samples:
                token_id = sampled[seq_id]
                sequence.output_token_ids.append(token_id)
                sequence.num_tokens += 1
                self._sampled.append((seq_id, token_id))
            if sequence.status is SequenceStatus.WAITING:
                # Preempted since: the blocks are gone.
                continue
            sequence.num_computed_tokens = num_computed_tokens = start + num_tokens
            if num_computed_tokens % block_size < num_tokens:
                # The end of a block is among them.
                self._blocks.commit(seq_id, sequence.tokens, num_computed_tokens)

    def undo(self, plans: list[StepPlan]) -> None:
        """Record that all open plans, in the order in which they were made, are as if they had not been run: their
        tokens are still to be computed. What they say of sequences and their blocks is known to the ranks."""
        self._updated_step = self._step
        for plan in reversed(plans):
            for chunk in plan.chunks:
                sequence = self._queues.live.get(chunk.seq_id)
                # One that was preempted since starts over.
                if sequence is not None and sequence.status is SequenceStatus.RUNNING:
                    sequence.num_scheduled_tokens = chunk.start

    def preempt_newest(self) -> bool:
        """Take the blocks of the running sequence that arrived last, and let fewer run together for some time, as steps
        of so many do not fit the device. False if only one is running: nobody could make room for it."""
        if self.num_running < 2:
            return False
        self._queues.preempt_last(self._step)
        self._max_num_running, self._num_patient_steps = self.num_running, 0
        return True

    def _take_heart(self) -> None:
        """A step did fit."""
        self._num_patient_steps += 1
        if self._num_patient_steps == _PATIENCE_STEPS:
            self._max_num_running, self._num_patient_steps = self._max_num_running + 1, 0

    def _take_sampled(self) -> tuple[tuple[int, int], ...]:
        """Tokens that no plan has told yet, of sequences that go on."""
        sampled, self._sampled = self._sampled, []
        if self._finished:
            sampled = [token for token in sampled if token[0] in self._queues.live]
        return tuple(sampled)

    def _num_prompt_tokens(self, num_decodes: int, num_decode_tokens: int, prompt_limit: int | None) -> int:
        """The room of passes 2 and 3."""
        num_tokens = min(self._max_num_batched_tokens - num_decodes, self._max_prompt_tokens)
        if prompt_limit is None or not (num_decode_tokens or self._decodes.has_open()):
            return num_tokens
        return min(num_tokens, prompt_limit)

    def _check_progress(self) -> None:
        """An empty plan with sequences left and nothing in flight would repeat for ever: better an error."""
        oldest = self._queues.oldest
        if oldest is not None:
            raise RuntimeError(
                f"nothing can be scheduled though {len(self._queues.live)} sequences are unfinished; sequence "
                f"{oldest.seq_id} outgrew what add() allowed it: finish() it at max_tokens and max_model_len"
            )
