"""Batches against tables, and random loads against a rank that knows nothing but the plans it is sent."""

from contextlib import suppress
from dataclasses import replace

import pytest
from fake_rank import FakeRank, Tokens, next_token
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from headrace.cache.block_manager import BlockManager
from headrace.config import PoolingParams, SamplingParams, SchedulerConfig
from headrace.engine.plan import ScheduledChunk, StepPlan
from headrace.engine.scheduler import Scheduler
from headrace.engine.sequence import FinishReason, Sequence, SequenceStatus
from headrace.errors import ConfigError, ContextLengthError, RequestError


class Engine:
    """Scheduler and rank, joined as the engine joins them, with the policy checked at every step."""

    def __init__(
        self,
        *,
        num_blocks: int = 100,
        block_size: int = 4,
        max_num_seqs: int = 8,
        max_num_batched_tokens: int = 64,
        max_model_len: int = 1000,
        enable_prefix_caching: bool = True,
    ) -> None:
        config = SchedulerConfig(
            max_num_seqs=max_num_seqs, max_num_batched_tokens=max_num_batched_tokens, max_model_len=max_model_len
        )
        self.max_model_len = max_model_len
        self.manager = BlockManager(num_blocks, block_size, enable_prefix_caching)
        self.scheduler = Scheduler(config, self.manager)
        self.rank = FakeRank(num_blocks, block_size, config)
        self.sequences: list[Sequence] = []
        self.left: list[int] = []

    def make_sequence(
        self,
        prompt: Tokens,
        max_tokens: int | None = 4,
        forked_from: Sequence | None = None,
        prompt_logprobs: int | None = None,
        pooling: PoolingParams | None = None,
    ) -> Sequence:
        seq_id = len(self.sequences)
        params = SamplingParams(max_tokens=max_tokens, prompt_logprobs=prompt_logprobs)
        return Sequence(
            seq_id=seq_id,
            request_id=f"r{seq_id}",
            prompt_token_ids=prompt,
            params=params,
            seed=seq_id,
            forked_from=forked_from,
            pooling=pooling,
        )

    def add(self, prompt: Tokens, max_tokens: int | None = 4, **kwargs: object) -> Sequence:
        sequence = self.make_sequence(prompt, max_tokens, **kwargs)  # type: ignore[arg-type]
        self.scheduler.add(sequence)
        self.sequences.append(sequence)
        return sequence

    def step(self, abort_midway: Tokens = (), prompt_limit: int | None = None) -> StepPlan:
        before = [replace(sequence) for sequence in self.sequences]
        plan = self.scheduler.schedule(prompt_limit)
        self.check_policy(before, plan)
        self.check_room(before, plan, prompt_limit)
        sampled = self.rank.run(plan)
        self.left.extend(plan.finished)
        self.check_tables()
        for seq_id in abort_midway:
            self.scheduler.abort(seq_id)
        for sequence in self.with_status(SequenceStatus.RUNNING):
            assert tuple(self.rank.sequences[sequence.seq_id].tokens) == sequence.tokens(0, sequence.num_tokens)
        self.scheduler.update(plan, sampled)
        for sequence in self.with_status(SequenceStatus.RUNNING):
            if self.is_done(sequence):
                self.scheduler.finish(sequence, FinishReason.LENGTH)
        self.manager.check_integrity()
        return plan

    def batch(self, prompt_limit: int | None = None) -> list[tuple[int, int, int]]:
        """One step; its chunks as (seq_id, start, num_tokens)."""
        chunks = self.step(prompt_limit=prompt_limit).chunks
        return [(chunk.seq_id, chunk.start, chunk.num_tokens) for chunk in chunks]

    def drain(self, max_num_steps: int) -> None:
        for _ in range(max_num_steps + 1):
            if not self.scheduler.has_unfinished:
                break
            assert self.step().chunks
        assert not self.scheduler.has_unfinished, f"unfinished after {max_num_steps} steps"
        assert self.scheduler.num_waiting == self.scheduler.num_running == 0
        assert not self.step().chunks
        assert self.manager.num_free_blocks == self.manager.num_blocks
        assert self.rank.sequences == {}
        assert sorted(self.left) == sorted(self.rank.seen), "ranks hear once of the end of what they have seen"
        for sequence in self.sequences:
            assert sequence.status is SequenceStatus.FINISHED
            if sequence.finish_reason is FinishReason.LENGTH:
                self.check_output(sequence)

    def with_status(self, status: SequenceStatus) -> list[Sequence]:
        return [sequence for sequence in self.sequences if sequence.status is status]

    def is_done(self, sequence: Sequence) -> bool:
        if sequence.pooling is not None:
            return sequence.num_computed_tokens == sequence.num_prompt_tokens
        return self.has_last_token(sequence)

    def has_last_token(self, sequence: Sequence) -> bool:
        max_tokens = sequence.params.max_tokens
        is_full = max_tokens is not None and len(sequence.output_token_ids) >= max_tokens
        return is_full or sequence.num_tokens >= self.max_model_len

    def check_output(self, sequence: Sequence) -> None:
        assert sequence.pooling is None or not sequence.output_token_ids
        tokens = sequence.prompt_token_ids
        for token_id in sequence.output_token_ids:
            assert token_id == next_token(tokens, sequence.seed)
            tokens = (*tokens, token_id)

    def check_tables(self) -> None:
        running = self.with_status(SequenceStatus.RUNNING)
        assert len(running) == self.scheduler.num_running
        assert len(self.with_status(SequenceStatus.WAITING)) == self.scheduler.num_waiting
        for sequence in running:
            table = self.manager.block_table(sequence.seq_id)
            assert tuple(self.rank.sequences[sequence.seq_id].block_table) == table

    def check_policy(self, before: list[Sequence], plan: StepPlan) -> None:
        """before: copies of all sequences, in order of arrival, as they were when the step was planned."""
        scheduled = {chunk.seq_id for chunk in plan.chunks}
        running = [old for old in before if old.status is SequenceStatus.RUNNING]
        preempted = {old.seq_id for old in running if self.sequences[old.seq_id].status is SequenceStatus.WAITING}
        admitted = {chunk.seq_id for chunk in plan.chunks if chunk.resets_blocks}
        assert {new.seq_id for new in plan.new} <= admitted
        assert not preempted & scheduled
        assert not (preempted and admitted)
        for old in running:
            is_decode = old.num_tokens - old.num_computed_tokens == 1
            assert not is_decode or old.seq_id in scheduled | preempted, "a decode was left out"
        if running:
            assert running[0].seq_id in scheduled, "the oldest did not move on"
        if preempted:
            assert min(preempted) > max(old.seq_id for old in running if old.seq_id not in preempted)
        self.check_overtaking(before, plan, admitted)

    def check_overtaking(self, before: list[Sequence], plan: StepPlan, admitted: set[int]) -> None:
        """Only beside a long prompt does anybody overtake, and all who are overtaken could run, too."""
        first = max(admitted, default=-1)
        overtaken = [
            old
            for old in before
            if old.status is SequenceStatus.WAITING
            and old.seq_id < first
            and old.seq_id not in admitted
            and not self.waits_for_sibling(old)
        ]
        if not overtaken:
            return
        assert any(is_cut(chunk, self.sequences) for chunk in plan.chunks), "somebody was overtaken though all fit"
        num_blocks = sum(self.manager.num_blocks_for(old.num_tokens) + 1 for old in overtaken)
        assert self.manager.num_free_blocks >= num_blocks, "somebody overtakes one who waits for blocks"
        assert self.scheduler.num_running + len(overtaken) <= self.rank.config.max_num_seqs

    def check_room(self, before: list[Sequence], plan: StepPlan, prompt_limit: int | None) -> None:
        single = {
            old.seq_id
            for old in before
            if old.status is SequenceStatus.RUNNING and old.num_tokens - old.num_computed_tokens == 1
        }
        prefills = [chunk for chunk in plan.chunks if chunk.seq_id not in single]
        room = self.rank.config.max_num_batched_tokens - (len(plan.chunks) - len(prefills))
        if prompt_limit is not None and plan.num_decode_tokens:
            room = min(room, prompt_limit)
        assert sum(chunk.num_tokens for chunk in prefills) <= room
        check_long(prefills, room, self.sequences)

    def waits_for_sibling(self, sequence: Sequence) -> bool:
        sibling = sequence.forked_from
        return (
            sibling is not None
            and sibling.status is not SequenceStatus.FINISHED
            and sibling.num_computed_tokens < sibling.num_prompt_tokens
            and not sequence.needs_whole_prompt
        )


def is_cut(chunk: ScheduledChunk, sequences: list[Sequence]) -> bool:
    return chunk.start + chunk.num_tokens < sequences[chunk.seq_id].num_tokens


def check_long(prefills: list[ScheduledChunk], room: int | None, sequences: list[Sequence]) -> None:
    """The first that does not fit gets at least half of what is left, and those behind it are short.

    room: None if it need not be full.
    """

    def num_left(chunk: ScheduledChunk) -> int:
        return sequences[chunk.seq_id].num_tokens - chunk.start

    cut = [chunk for chunk in prefills if is_cut(chunk, sequences)]
    assert len(cut) <= 2
    if not cut:
        return
    # Who runs comes before who waits.
    in_order = sorted(prefills, key=lambda chunk: (chunk.resets_blocks, chunk.seq_id))
    long = max(cut, key=num_left)
    behind = in_order[in_order.index(long) + 1 :]
    assert all(2 * num_left(chunk) <= num_left(long) for chunk in behind)
    assert set(cut) <= {long, *behind}
    num_tokens = sum(chunk.num_tokens for chunk in (long, *behind))
    assert 2 * long.num_tokens >= num_tokens, "the long prompt got less than half"
    assert room is None or sum(chunk.num_tokens for chunk in prefills) == room, "cut though there was room"


def prompts(*lengths: int) -> list[Tokens]:
    """Prompts of these lengths without a common prefix."""
    return [tuple(range(100 * index, 100 * index + length)) for index, length in enumerate(lengths, start=1)]


@pytest.mark.parametrize(
    ("lengths", "limits", "expected"),
    [
        pytest.param([5], {}, [[(0, 0, 5)], [(0, 5, 1)], [(0, 6, 1)], [(0, 7, 1)], []], id="prefill_then_decode"),
        pytest.param([1], {}, [[(0, 0, 1)], [(0, 1, 1)], [(0, 2, 1)], [(0, 3, 1)], []], id="one_token"),
        pytest.param(
            [10],
            {"max_num_batched_tokens": 4, "max_num_seqs": 4},
            [[(0, 0, 4)], [(0, 4, 4)], [(0, 8, 2)], [(0, 10, 1)]],
            id="long_prompt_in_chunks",
        ),
        pytest.param(
            [3, 6],
            {"max_num_batched_tokens": 8},
            [[(0, 0, 3), (1, 0, 5)], [(0, 3, 1), (1, 5, 1)], [(0, 4, 1), (1, 6, 1)]],
            id="two_prompts_share_the_budget",
        ),
        pytest.param(
            [2, 10],
            {"max_num_batched_tokens": 4, "max_num_seqs": 4},
            [[(0, 0, 2), (1, 0, 2)], [(0, 2, 1), (1, 2, 3)], [(0, 3, 1), (1, 5, 3)], [(0, 4, 1), (1, 8, 2)]],
            id="decode_goes_on_beside_a_long_prompt",
        ),
        pytest.param(
            [2, 9],
            {"max_num_batched_tokens": 2, "max_num_seqs": 2},
            [[(0, 0, 2)], [(0, 2, 1), (1, 0, 1)], [(0, 3, 1), (1, 1, 1)], [(0, 4, 1), (1, 2, 1)], [(1, 3, 2)]],
            id="long_prompt_goes_on_in_a_full_budget",
        ),
        pytest.param(
            [2, 2, 2],
            {"max_num_seqs": 2},
            [[(0, 0, 2), (1, 0, 2)], *([(0, n, 1), (1, n, 1)] for n in (2, 3, 4)), [(2, 0, 2)]],
            id="max_num_seqs",
        ),
        pytest.param(
            [8, 12, 1],
            {"num_blocks": 5},
            [[(0, 0, 8)], [(0, 8, 1)], [(0, 9, 1)], [(0, 10, 1)], [(1, 0, 12), (2, 0, 1)]],
            id="nobody_overtakes_a_large_request",
        ),
        pytest.param(
            [6, 6],
            {"max_num_batched_tokens": 4, "max_num_seqs": 3},
            [[(0, 0, 4)], [(0, 4, 2), (1, 0, 2)], [(0, 6, 1), (1, 2, 3)], [(0, 7, 1), (1, 5, 1)]],
            id="next_prompt_starts_in_the_rest_of_a_step",
        ),
        pytest.param(
            [20, 4],
            {"max_num_batched_tokens": 8},
            [[(0, 0, 4), (1, 0, 4)], [(1, 4, 1), (0, 4, 7)], [(1, 5, 1), (0, 11, 7)], [(1, 6, 1), (0, 18, 2)]],
            id="a_short_prompt_runs_beside_a_long_one",
        ),
        pytest.param(
            [20, 11, 5, 9, 2],
            {"max_num_batched_tokens": 12},
            [
                [(0, 0, 6), (4, 0, 2), (2, 0, 4)],
                [(2, 4, 1), (4, 2, 1), (0, 6, 10)],
                [(2, 5, 1), (4, 3, 1), (0, 16, 4), (1, 0, 6)],
            ],
            id="the_shortest_first_and_none_above_half_of_the_long_one",
        ),
        pytest.param(
            [100, 40, 30],
            {"max_num_batched_tokens": 16},
            [
                [(0, 0, 8), (2, 0, 8)],
                *([(0, 8 * n, 8), (2, 8 * n, 8)] for n in (1, 2)),
                [(0, 24, 10), (2, 24, 6)],
                [(2, 30, 1), (0, 34, 15)],
            ],
            id="a_short_prompt_in_chunks_of_its_own",
        ),
        pytest.param(
            [3, 20, 3],
            {"max_num_batched_tokens": 10},
            [[(0, 0, 3), (1, 0, 4), (2, 0, 3)]],
            id="half_of_what_older_prompts_leave",
        ),
        pytest.param(
            [20, 20, 2],
            {"max_num_batched_tokens": 8, "max_num_seqs": 2},
            [[(0, 0, 8)], [(0, 8, 8)], [(0, 16, 4), (1, 0, 4)]],
            id="no_overtaking_where_slots_are_wanting",
        ),
        pytest.param(
            [20, 20, 2],
            {"max_num_batched_tokens": 8, "num_blocks": 12},
            [[(0, 0, 8)], [(0, 8, 8)], [(0, 16, 4), (1, 0, 4)], [(0, 20, 1), (1, 4, 7)]],
            id="no_overtaking_where_blocks_are_wanting",
        ),
        pytest.param(
            [20, 20, 2],
            {"max_num_batched_tokens": 8, "num_blocks": 13},
            [[(0, 0, 6), (2, 0, 2)], [(2, 2, 1), (0, 6, 7)], [(2, 3, 1), (0, 13, 7)], [(0, 20, 1), (2, 4, 1)]],
            id="overtaking_where_they_suffice",
        ),
    ],
)
def test_batches(lengths: list[int], limits: dict[str, int], expected: list[list[tuple[int, int, int]]]) -> None:
    engine = Engine(**limits)
    for prompt in prompts(*lengths):
        engine.add(prompt)
    assert [engine.batch() for _ in expected] == expected
    engine.drain(100)


def test_prompt_tokens_are_limited_while_somebody_decodes() -> None:
    engine = Engine()
    short, long = prompts(2, 30)
    engine.add(short, max_tokens=3)
    assert engine.batch(prompt_limit=1) == [(0, 0, 2)], "nobody decodes yet"
    engine.add(long)
    assert [engine.batch(prompt_limit=n) for n in (5, 9)] == [[(0, 2, 1), (1, 0, 5)], [(0, 3, 1), (1, 5, 9)]]
    assert engine.batch(prompt_limit=1) == [(1, 14, 16)]
    engine.drain(20)


def test_a_prompt_that_the_cache_has_most_of_is_short() -> None:
    engine = Engine(max_num_batched_tokens=8)
    (stem,) = prompts(16)
    engine.add(stem, max_tokens=1)
    engine.drain(10)
    engine.add(tuple(range(1000, 1020)))
    engine.add((*stem, 1, 2, 3))
    assert engine.batch() == [(1, 0, 5), (2, 16, 3)]
    engine.drain(20)


def test_an_overtaken_prompt_is_the_next_to_run() -> None:
    """Short prompts that keep coming hold up neither the long one that runs nor the one that waits."""
    engine = Engine(max_num_batched_tokens=8, num_blocks=60)
    long, next_long = (engine.add(prompt, max_tokens=1) for prompt in prompts(24, 24))
    num_steps = 0
    while next_long.status is not SequenceStatus.FINISHED:
        engine.add((num_steps, num_steps + 1), max_tokens=2)
        engine.step()
        num_steps += 1
        assert num_steps <= 12, "each gets at least half of the 8 tokens that are left beside decodes"
    assert long.status is SequenceStatus.FINISHED
    engine.drain(60)


def test_decodes_come_first_in_the_batch() -> None:
    """A fork waits for its sibling, so it can be older than a sequence that decodes already."""
    engine = Engine(max_num_batched_tokens=8, block_size=16)
    parent, other = prompts(6, 1)
    first = engine.add(parent)
    engine.add(parent, forked_from=first)
    engine.add(other)
    assert engine.batch() == [(0, 0, 6), (2, 0, 1)]
    assert engine.batch() == [(0, 6, 1), (2, 1, 1), (1, 0, 6)]
    assert engine.batch() == [(0, 7, 1), (1, 6, 1), (2, 2, 1)]


def test_a_reserve_of_one_block_for_each_running_sequence() -> None:
    engine = Engine(num_blocks=5, enable_prefix_caching=False)
    for prompt in prompts(8, 9):
        engine.add(prompt)
    assert engine.batch() == [(0, 0, 8)], "3 of 3 free blocks would leave none to the first"
    engine = Engine(num_blocks=5, enable_prefix_caching=False)
    for prompt in prompts(8, 8):
        engine.add(prompt)
    assert engine.batch() == [(0, 0, 8), (1, 0, 8)]


def test_the_latest_is_preempted_and_starts_over_before_later_arrivals() -> None:
    engine = Engine(num_blocks=5, enable_prefix_caching=False)
    loads = zip(prompts(8, 7, 4), (7, 7, 1), strict=True)
    first, second, third = (engine.add(prompt, max_tokens) for prompt, max_tokens in loads)
    assert engine.batch() == [(0, 0, 8), (1, 0, 7)]
    assert engine.batch() == [(0, 8, 1), (1, 7, 1)]
    assert engine.batch() == [(0, 9, 1)], "the second needed a third block and was itself the latest"
    assert (second.status, second.num_computed_tokens, second.num_preemptions) == (SequenceStatus.WAITING, 0, 1)
    assert (engine.scheduler.num_running, engine.scheduler.num_waiting) == (1, 2)
    assert [engine.batch() for _ in range(4)] == [[(0, n, 1)] for n in (10, 11, 12, 13)]
    assert first.status is SequenceStatus.FINISHED
    plan = engine.step()
    assert [(chunk.seq_id, chunk.start, chunk.num_tokens) for chunk in plan.chunks] == [(1, 0, 9), (2, 0, 4)]
    assert plan.chunks[0].resets_blocks
    assert [new.seq_id for new in plan.new] == [2], "ranks know the second already"
    engine.drain(20)
    assert engine.scheduler.num_preemptions == 1
    assert third.num_preemptions == 0


def test_an_older_sequence_takes_the_blocks_of_the_latest() -> None:
    engine = Engine(num_blocks=5, enable_prefix_caching=False)
    first, second = (engine.add(prompt, max_tokens=8) for prompt in prompts(7, 8))
    assert [engine.batch() for _ in range(3)] == [[(0, 0, 7), (1, 0, 8)], [(0, 7, 1), (1, 8, 1)], [(0, 8, 1)]]
    assert (first.num_preemptions, second.num_preemptions) == (0, 1)
    engine.drain(30)


def test_a_preempted_sequence_finds_its_own_blocks_again() -> None:
    engine = Engine(num_blocks=5)
    _, second = (engine.add(prompt, max_tokens=4) for prompt in prompts(7, 8))
    engine.step()
    engine.step()
    assert engine.batch() == [(0, 8, 1)]
    assert second.status is SequenceStatus.WAITING
    batches = [engine.batch() for _ in range(2)]
    assert batches == [[(0, 9, 1)], [(1, 8, 2)]]
    assert second.num_cached_tokens == 0, "counted at first admission only"
    engine.drain(20)


def test_prefix_hits() -> None:
    engine = Engine()
    prompt = tuple(range(10))
    first = engine.add(prompt)
    engine.drain(10)
    same, longer, other = engine.add(prompt), engine.add((*prompt[:8], 50, 51)), engine.add((50, *prompt))
    assert engine.batch() == [(1, 8, 2), (2, 8, 2), (3, 0, 11)]
    assert [sequence.num_cached_tokens for sequence in (first, same, longer, other)] == [0, 8, 8, 0]
    engine.drain(20)


def test_a_hit_never_covers_the_whole_prompt() -> None:
    engine = Engine()
    for _ in range(2):
        engine.add(tuple(range(8)))
        engine.drain(10)
    assert engine.sequences[1].num_cached_tokens == 4


def test_outputs_are_found_as_prefixes_too() -> None:
    engine = Engine()
    first = engine.add((1, 2, 3), max_tokens=6)
    engine.drain(10)
    second = engine.add((1, 2, 3, *first.output_token_ids, 1))
    engine.step()
    assert second.num_cached_tokens == 8


def test_prompt_logprobs_use_no_shared_blocks_and_do_not_wait() -> None:
    engine = Engine(max_num_batched_tokens=25)
    prompt = tuple(range(10))
    engine.add(prompt)
    engine.drain(10)
    first = engine.add(prompt, prompt_logprobs=0)
    second = engine.add(prompt, prompt_logprobs=0, forked_from=first)
    assert engine.batch() == [(1, 0, 10), (2, 0, 10)]
    assert (first.num_cached_tokens, second.num_cached_tokens) == (0, 0)
    engine.drain(20)


@pytest.mark.parametrize("enable_prefix_caching", [True, False], ids=["caching", "no_caching"])
def test_forks_wait_for_the_prompt_and_share_it(enable_prefix_caching: bool) -> None:
    engine = Engine(max_num_batched_tokens=8, enable_prefix_caching=enable_prefix_caching)
    prompt, other = prompts(11, 2)
    first = engine.add(prompt)
    forks = [engine.add(prompt, forked_from=first) for _ in range(2)]
    engine.add(other)
    assert engine.batch() == [(0, 0, 6), (3, 0, 2)], "who comes behind the forks is not held up"
    assert engine.batch() == [(3, 2, 1), (0, 6, 5)]
    assert engine.batch() == [(0, 11, 1), (3, 3, 1), (1, 8, 3), (2, 8, 3)]
    assert [fork.num_cached_tokens for fork in forks] == [8, 8]
    tables = [engine.manager.block_table(seq_id) for seq_id in range(3)]
    assert tables[0][:2] == tables[1][:2] == tables[2][:2]
    engine.drain(20)


def test_a_fork_computes_at_least_one_token() -> None:
    engine = Engine(enable_prefix_caching=False)
    (prompt,) = prompts(8)
    first = engine.add(prompt)
    engine.add(prompt, forked_from=first)
    assert [engine.batch() for _ in range(2)] == [[(0, 0, 8)], [(0, 8, 1), (1, 4, 4)]]
    engine.drain(20)


@pytest.mark.parametrize("is_aborted", [True, False], ids=["aborted", "finished"])
def test_a_fork_of_a_sibling_that_left_runs_alone(is_aborted: bool) -> None:
    engine = Engine(max_num_batched_tokens=8, enable_prefix_caching=False)
    (prompt,) = prompts(11)
    first = engine.add(prompt, max_tokens=1)
    engine.add(prompt, forked_from=first)
    assert engine.batch() == [(0, 0, 8)]
    if is_aborted:
        engine.scheduler.abort(0)
    else:
        assert engine.batch() == [(0, 8, 3)]
    assert engine.batch() == [(1, 0, 8)]
    engine.drain(20)


@pytest.mark.parametrize(
    ("enable_prefix_caching", "chunk"), [(False, (2, 8, 8)), (True, (2, 12, 4))], ids=["no_caching", "caching"]
)
def test_a_preempted_fork_shares_again(enable_prefix_caching: bool, chunk: tuple[int, int, int]) -> None:
    """The sibling still has the prompt; the cache also has what is left of the fork's own output."""
    engine = Engine(num_blocks=8, enable_prefix_caching=enable_prefix_caching)
    (prompt,) = prompts(9)
    parent = engine.add(prompt, max_tokens=12)
    _, fork = (engine.add(prompt, max_tokens=10, forked_from=parent) for _ in range(2))
    assert [engine.batch() for _ in range(2)] == [[(0, 0, 9)], [(0, 9, 1), (1, 8, 1), (2, 8, 1)]]
    assert [len(engine.batch()) for _ in range(7)] == [3, 3, 3, 3, 3, 3, 2]
    assert (fork.status, len(fork.output_token_ids)) == (SequenceStatus.WAITING, 7)
    engine.scheduler.abort(1)
    assert engine.batch() == [(0, 17, 1), chunk]
    assert engine.manager.block_table(2)[:2] == engine.manager.block_table(0)[:2]
    engine.drain(20)


@pytest.mark.parametrize(
    ("length", "max_tokens", "max_model_len", "num_blocks", "message"),
    [
        (
            10,
            4,
            10,
            100,
            r"the prompt has 10 tokens, but .* 10 \(max_model_len\); shorten the prompt to at most 9 tokens",
        ),
        (
            10,
            12,
            1000,
            5,
            r"10 tokens and up to 12 output tokens need 6 KV .* 4 tokens, .* has 5; set max_tokens to at most 11",
        ),
        (
            10,
            None,
            30,
            5,
            r"10 tokens and up to 20 output tokens need 8 KV cache blocks .* has 5; set max_tokens to at most 11",
        ),
        (
            21,
            1,
            1000,
            5,
            r"21 tokens and up to 1 output tokens need 6 .* has 5; shorten the prompt to at most 20 tokens",
        ),
    ],
)
def test_what_could_never_fit_is_refused(
    length: int, max_tokens: int | None, max_model_len: int, num_blocks: int, message: str
) -> None:
    engine = Engine(num_blocks=num_blocks, max_model_len=max_model_len)
    with pytest.raises(ContextLengthError, match=message):
        engine.add(tuple(range(length)), max_tokens)
    assert not engine.scheduler.has_unfinished


@pytest.mark.parametrize(
    ("length", "max_tokens", "max_model_len", "num_outputs"),
    [(10, 11, 1000, 11), (20, 1, 1000, 1), (10, 500, 21, 11), (20, None, 21, 1), (1, None, 21, 20)],
)
def test_what_just_fits_runs_to_its_end(
    length: int, max_tokens: int | None, max_model_len: int, num_outputs: int
) -> None:
    engine = Engine(num_blocks=5, max_model_len=max_model_len)
    sequence = engine.add(tuple(range(length)), max_tokens)
    engine.drain(40)
    assert len(sequence.output_token_ids) == num_outputs
    assert sequence.num_preemptions == 0


def test_an_empty_prompt_is_refused() -> None:
    with pytest.raises(RequestError, match="the prompt has 0 tokens; give at least one"):
        Engine().add(())


def test_what_cannot_be_added() -> None:
    engine = Engine()
    first = engine.add((1, 2, 3))
    with pytest.raises(ValueError, match="sequence 0 was added before"):
        engine.scheduler.add(first)
    with pytest.raises(ValueError, match="sequence 1 is forked from 0, whose prompt is another"):
        engine.add((1, 2), forked_from=first)
    stranger = engine.make_sequence((1, 2))
    stranger.seq_id = 9
    with pytest.raises(ValueError, match="sequence 1 is forked from 9; add that one first"):
        engine.add((1, 2), forked_from=stranger)
    engine.scheduler.abort(0)
    with pytest.raises(ValueError, match="sequence 0 was added before"):
        engine.scheduler.add(first)


def test_the_model_length_must_be_known() -> None:
    with pytest.raises(ConfigError, match="max_model_len is None"):
        Scheduler(SchedulerConfig(), BlockManager(4, 4, enable_prefix_caching=True))


def test_a_step_must_be_updated_before_the_next() -> None:
    engine = Engine()
    engine.add((1, 2, 3))
    plan = engine.scheduler.schedule()
    with pytest.raises(RuntimeError, match=r"step 1 was planned but not updated; call update\(\)"):
        engine.scheduler.schedule()
    with pytest.raises(KeyError):
        engine.scheduler.update(plan, {})


def test_a_sequence_that_is_never_finished_ends_in_an_error() -> None:
    engine = Engine(num_blocks=2)
    engine.add((1, 2, 3), max_tokens=2)
    with pytest.raises(RuntimeError, match=r"sequence 0 outgrew what add\(\) allowed it: finish\(\) it at max_tokens"):
        for _ in range(20):
            plan = engine.scheduler.schedule()
            engine.scheduler.update(plan, {0: 1})


def test_abort_in_every_state() -> None:
    engine = Engine(max_num_seqs=2)
    waiting, running, midway, done = (engine.add(prompt) for prompt in prompts(5, 6, 7, 8))
    engine.scheduler.abort(waiting.seq_id)
    plan = engine.step(abort_midway=(midway.seq_id,))
    assert [chunk.seq_id for chunk in plan.chunks] == [1, 2]
    assert (midway.output_token_ids, midway.status) == ([], SequenceStatus.FINISHED)
    plan = engine.step()
    assert plan.finished == (2,), "the first was never seen by the ranks"
    engine.scheduler.abort(running.seq_id)
    engine.drain(20)
    engine.scheduler.abort(done.seq_id)
    engine.scheduler.abort(12345)
    reasons = [sequence.finish_reason for sequence in engine.sequences]
    assert reasons == [FinishReason.ABORT, FinishReason.ABORT, FinishReason.ABORT, FinishReason.LENGTH]


def test_finish_keeps_the_first_reason_and_knows_its_sequences() -> None:
    engine = Engine()
    sequence = engine.add((1, 2, 3))
    engine.step()
    engine.scheduler.finish(sequence, FinishReason.STOP)
    engine.scheduler.finish(sequence, FinishReason.ABORT)
    assert sequence.finish_reason is FinishReason.STOP
    assert engine.scheduler.schedule().finished == (0,)
    assert engine.scheduler.schedule().finished == ()
    with pytest.raises(KeyError):
        engine.scheduler.finish(engine.make_sequence((1,)), FinishReason.STOP)


@pytest.mark.parametrize(("pooling", "num_cached_tokens"), [("last", 8), ("mean", 0)])
def test_a_prompt_that_is_pooled(pooling: str, num_cached_tokens: int) -> None:
    """It is computed to its last token, which samples nothing, and may share only where not all of it is needed."""
    engine = Engine(max_num_batched_tokens=9)
    prompt, other = prompts(10, 3)
    engine.add(prompt, max_tokens=1)
    engine.drain(10)
    sequence = engine.add(prompt, pooling=PoolingParams(pooling=pooling))  # type: ignore[arg-type]
    engine.add(other, max_tokens=2)
    plans = [engine.step() for _ in range(2)]
    assert sequence.num_cached_tokens == num_cached_tokens
    assert [chunk.samples for plan in plans for chunk in plan.chunks if chunk.seq_id == 1] == [False] * (
        2 - num_cached_tokens // 8
    )
    assert (sequence.status, sequence.output_token_ids) == (SequenceStatus.FINISHED, [])
    engine.drain(10)


@pytest.mark.parametrize(("length", "num_blocks", "fits"), [(20, 5, True), (21, 6, False), (17, 4, False)])
def test_a_prompt_that_is_pooled_may_have_the_whole_length(length: int, num_blocks: int, fits: bool) -> None:
    engine = Engine(num_blocks=num_blocks, max_model_len=20)
    prompt = tuple(range(length))
    if not fits:
        with pytest.raises(ContextLengthError, match=r"shorten the prompt to at most (20|16) tokens"):
            engine.add(prompt, pooling=PoolingParams())
        return
    engine.add(prompt, pooling=PoolingParams())
    engine.drain(1)


def test_an_idle_scheduler_plans_nothing() -> None:
    plan = Engine().scheduler.schedule()
    assert (plan.new, plan.finished, plan.chunks) == ((), (), ())


@st.composite
def engines(draw: st.DrawFn) -> Engine:
    max_num_seqs = draw(st.integers(1, 5))
    return Engine(
        num_blocks=draw(st.integers(4, 16)),
        block_size=draw(st.integers(1, 4)),
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_seqs + draw(st.integers(0, 10)),
        max_model_len=draw(st.integers(12, 30)),
        enable_prefix_caching=draw(st.booleans()),
    )


# Two letters, and often one of a few stems: prompts share prefixes of every length.
random_prompts = st.builds(
    lambda stem, tail: (*stem, *tail),
    st.sampled_from([(), (0,) * 4, (0,) * 8, (0, 1) * 4]),
    st.lists(st.integers(0, 1), min_size=1, max_size=8),
)


@settings(deadline=None, max_examples=150)
@given(engine=engines(), loads=st.lists(st.tuples(random_prompts, st.integers(1, 10)), min_size=1, max_size=8))
def test_nobody_starves(engine: Engine, loads: list[tuple[Tokens, int]]) -> None:
    """Without forks the oldest computes a token in every step and keeps it, which bounds the steps of all together."""
    max_num_steps = 0
    for prompt, max_tokens in loads:
        try:
            engine.add(prompt, max_tokens)
        except ContextLengthError:
            continue
        max_num_steps += len(prompt) + max_tokens - 1
    engine.drain(max_num_steps)
    assert all(sequence.finish_reason is FinishReason.LENGTH for sequence in engine.sequences)


class SchedulerMachine(RuleBasedStateMachine):
    """Random arrivals, forks and cancels in a small cache; every plan is executed and checked by the rank."""

    @initialize(engine=engines())
    def start(self, engine: Engine) -> None:
        self.engine = engine

    @rule(
        prompt=random_prompts,
        max_tokens=st.none() | st.integers(1, 12),
        num_outputs=st.integers(1, 4),
        prompt_logprobs=st.sampled_from([None, None, None, 0]),
    )
    def add(self, prompt: Tokens, max_tokens: int | None, num_outputs: int, prompt_logprobs: int | None) -> None:
        try:
            first = self.engine.add(prompt, max_tokens, prompt_logprobs=prompt_logprobs)
        except ContextLengthError:
            return
        for _ in range(num_outputs - 1):
            self.engine.add(prompt, max_tokens, prompt_logprobs=prompt_logprobs, forked_from=first)

    @rule(prompt=random_prompts, pooling=st.sampled_from(["last", "mean"]))
    def pool(self, prompt: Tokens, pooling: str) -> None:
        with suppress(ContextLengthError):
            self.engine.add(prompt, pooling=PoolingParams(pooling=pooling))  # type: ignore[arg-type]

    @rule(num_steps=st.integers(1, 6), prompt_limit=st.none() | st.integers(1, 12))
    def step(self, num_steps: int, prompt_limit: int | None) -> None:
        for _ in range(num_steps):
            has_work = self.engine.scheduler.has_unfinished
            assert bool(self.engine.step(prompt_limit=prompt_limit).chunks) == has_work

    @precondition(lambda self: self.engine.sequences)
    @rule(data=st.data(), is_midway=st.booleans())
    def abort(self, data: st.DataObject, is_midway: bool) -> None:
        seq_id = data.draw(st.integers(0, len(self.engine.sequences) - 1))
        if is_midway:
            self.engine.step(abort_midway=(seq_id,))
        else:
            self.engine.scheduler.abort(seq_id)

    def teardown(self) -> None:
        # A fork that becomes the oldest can take back what its forerunner as the oldest had computed.
        num_left = sum(30 for sequence in self.engine.sequences if sequence.status is not SequenceStatus.FINISHED)
        num_forks = sum(sequence.forked_from is not None for sequence in self.engine.sequences)
        self.engine.drain(num_left * (1 + num_forks))


SchedulerMachine.TestCase.settings = settings(deadline=None, max_examples=120, stateful_step_count=30)
TestSchedulerMachine = SchedulerMachine.TestCase
