"""A rank that knows nothing but the plans it is sent, and checks that they can be run."""

from dataclasses import dataclass, field

from headrace.config import Pooling, PoolingParams, SchedulerConfig
from headrace.engine.plan import ScheduledChunk, StepPlan

Tokens = tuple[int, ...]
VOCAB_SIZE = 3


def next_token(tokens: Tokens, seed: int) -> int:
    """A language model."""
    return (7 * sum(tokens) + len(tokens) + seed) % VOCAB_SIZE


@dataclass
class RankSequence:
    tokens: list[int]
    seed: int
    pooling: PoolingParams | None = None
    block_table: list[int] = field(default_factory=list)
    num_computed_tokens: int = 0


class FakeRank:
    """Runs plans as a rank would, with a cache whose slots hold the tokens that keys and values would depend on.

    slots: slot -> all tokens from the sequence's first one to the slot's own; what was last written there stays.
    """

    def __init__(self, num_blocks: int, block_size: int, config: SchedulerConfig) -> None:
        self.num_blocks, self.block_size, self.config = num_blocks, block_size, config
        self.sequences: dict[int, RankSequence] = {}
        self.slots: dict[int, Tokens] = {}
        self.seen: set[int] = set()
        self.step = 0

    def run(self, plan: StepPlan) -> dict[int, int]:
        """Check and execute one plan; returns the sampled tokens."""
        self.step += 1
        assert plan.step == self.step
        assert plan.num_tokens <= self.config.max_num_batched_tokens
        assert len({chunk.seq_id for chunk in plan.chunks}) == len(plan.chunks) <= self.config.max_num_seqs
        for seq_id, token_id in plan.sampled:
            self.sequences[seq_id].tokens.append(token_id)
        for seq_id in plan.finished:
            del self.sequences[seq_id]
        for new in plan.new:
            assert new.seq_id not in self.seen
            self.seen.add(new.seq_id)
            self.sequences[new.seq_id] = RankSequence(list(new.prompt_token_ids), new.seed, new.pooling)
        for chunk in plan.chunks:
            self.update_table(chunk)
        for chunk in plan.chunks:
            self.check_slots(chunk, 0, chunk.start)
        self.write_slots(plan)
        for chunk in plan.chunks:
            self.check_slots(chunk, 0, chunk.start + chunk.num_tokens)
        return dict(self.sample(chunk) for chunk in plan.chunks if chunk.samples)

    def undo(self, plan: StepPlan) -> None:
        """As if the plan had not been run, the last one first: nobody may read what it has left in the cache."""
        for chunk in plan.chunks:
            sequence = self.sequences.get(chunk.seq_id)
            if sequence is None:
                continue  # A later plan said that it has left: nobody can read what it wrote.
            sequence.num_computed_tokens = chunk.start
            for position in range(chunk.start, chunk.start + chunk.num_tokens):
                self.slots[self.slot(sequence, position)] = ()

    def update_table(self, chunk: ScheduledChunk) -> None:
        sequence = self.sequences[chunk.seq_id]
        assert chunk.num_tokens >= 1
        if chunk.resets_blocks:
            sequence.block_table = []
            if sequence.pooling is not None and sequence.pooling.pooling is Pooling.MEAN:
                assert chunk.start == 0, "the mean needs every hidden state"
        else:
            assert chunk.start == sequence.num_computed_tokens
        sequence.block_table.extend(chunk.new_block_ids)
        sequence.num_computed_tokens = chunk.start + chunk.num_tokens
        assert all(0 <= block_id < self.num_blocks for block_id in sequence.block_table)
        assert sequence.num_computed_tokens <= len(sequence.tokens)
        assert sequence.num_computed_tokens <= len(sequence.block_table) * self.block_size
        reaches_end = sequence.num_computed_tokens == len(sequence.tokens)
        assert chunk.samples == (reaches_end and sequence.pooling is None)

    def slot(self, sequence: RankSequence, position: int) -> int:
        return sequence.block_table[position // self.block_size] * self.block_size + position % self.block_size

    def check_slots(self, chunk: ScheduledChunk, start: int, stop: int) -> None:
        sequence = self.sequences[chunk.seq_id]
        for position in range(start, stop):
            expected = tuple(sequence.tokens[: position + 1])
            assert self.slots.get(self.slot(sequence, position)) == expected, f"{chunk} reads position {position}"

    def write_slots(self, plan: StepPlan) -> None:
        written: set[int] = set()
        for chunk in plan.chunks:
            sequence = self.sequences[chunk.seq_id]
            for position in range(chunk.start, chunk.start + chunk.num_tokens):
                slot = self.slot(sequence, position)
                assert slot not in written, f"two tokens of one step share slot {slot}"
                written.add(slot)
                self.slots[slot] = tuple(sequence.tokens[: position + 1])

    def sample(self, chunk: ScheduledChunk) -> tuple[int, int]:
        sequence = self.sequences[chunk.seq_id]
        token_id = next_token(tuple(sequence.tokens), sequence.seed)
        return chunk.seq_id, token_id
