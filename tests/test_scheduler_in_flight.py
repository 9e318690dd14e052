"""Several plans in flight: random loads through a pipeline that answers late, against a rank that knows plans alone.

The rank runs each plan when it is made and its answer comes back later. That is what any pipeline does, however fast
its stages are: each of them sees the same plans in the same order, and no plan depends on when an earlier one was run.
"""

from collections import deque
from contextlib import suppress

import pytest
from fake_rank import FakeRank, Tokens, next_token
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule
from test_scheduler import check_long

from headrace.cache.block_manager import BlockManager
from headrace.config import PoolingParams, SamplingParams, SchedulerConfig
from headrace.costs.micro_batches import MIN_MICRO_BATCH_TOKENS, decode_share, max_prompt_tokens
from headrace.engine.plan import ScheduledChunk, StepPlan
from headrace.engine.scheduler import Scheduler
from headrace.engine.sequence import FinishReason, Sequence, SequenceStatus
from headrace.errors import ConfigError, ContextLengthError

Chunk = tuple[int, int, int]
"""seq_id, start, num_tokens."""


class Pipeline:
    """Scheduler and rank with up to max_in_flight plans between them, with the policy checked at every plan."""

    def __init__(
        self,
        max_in_flight: int,
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
        self.config, self.max_in_flight, self.max_model_len = config, max_in_flight, max_model_len
        self.manager = BlockManager(num_blocks, block_size, enable_prefix_caching)
        self.scheduler = Scheduler(config, self.manager, max_in_flight)
        self.rank = FakeRank(num_blocks, block_size, config)
        self.sequences: list[Sequence] = []
        self.in_flight: deque[tuple[StepPlan, dict[int, int]]] = deque()
        self.left: list[int] = []

    def add(
        self,
        prompt: Tokens,
        max_tokens: int | None = 4,
        forked_from: Sequence | None = None,
        prompt_logprobs: int | None = None,
        pooling: PoolingParams | None = None,
    ) -> Sequence:
        seq_id = len(self.sequences)
        sequence = Sequence(
            seq_id=seq_id,
            request_id=f"r{seq_id}",
            prompt_token_ids=prompt,
            params=SamplingParams(max_tokens=max_tokens, prompt_logprobs=prompt_logprobs),
            seed=seq_id,
            forked_from=forked_from,
            pooling=pooling,
        )
        self.scheduler.add(sequence)
        self.sequences.append(sequence)
        return sequence

    def submit(self, prompt_limit: int | None = None) -> list[Chunk] | None:
        """The chunks of one more plan; None if there is nothing to plan now."""
        decoding = [sequence for sequence in self.with_status(SequenceStatus.RUNNING) if is_decoding(sequence)]
        plan = self.scheduler.schedule(prompt_limit)
        self.manager.check_integrity()
        if plan is None:
            assert self.in_flight
            self.check_idle()
            return None
        is_awaited = any(s.output_token_ids and s.status is SequenceStatus.RUNNING for s in decoding)
        self.check_plan(plan, {s.seq_id for s in decoding}, prompt_limit if is_awaited else None)
        sampled = self.rank.run(plan)
        self.left.extend(plan.finished)
        for sequence in self.with_status(SequenceStatus.RUNNING):
            table = tuple(self.rank.sequences[sequence.seq_id].block_table)
            assert table == self.manager.block_table(sequence.seq_id)
        if plan.chunks:
            self.in_flight.append((plan, sampled))
        return [(chunk.seq_id, chunk.start, chunk.num_tokens) for chunk in plan.chunks]

    def fill(self) -> list[list[Chunk]]:
        """Plans until the pipeline is full or nothing can be planned."""
        plans: list[list[Chunk]] = []
        while len(self.in_flight) < self.max_in_flight:
            chunks = self.submit()
            if not chunks:
                break
            plans.append(chunks)
        return plans

    def collect(self) -> None:
        """The oldest plan comes back."""
        plan, sampled = self.in_flight.popleft()
        self.scheduler.update(plan, sampled)
        self.manager.check_integrity()
        for chunk in plan.chunks:
            sequence = self.sequences[chunk.seq_id]
            is_done = self.is_pooled(chunk) or (sequence.pooling is None and self.has_last_token(sequence))
            if sequence.status is not SequenceStatus.FINISHED and is_done:
                self.scheduler.finish(sequence, FinishReason.LENGTH)
        self.manager.check_integrity()

    def undo(self) -> None:
        """The oldest plan did not fit a rank's memory, which undoes those behind it, too."""
        plans = [plan for plan, _ in self.in_flight]
        self.in_flight.clear()
        for plan in reversed(plans):
            self.rank.undo(plan)
        self.scheduler.undo(plans)
        self.scheduler.preempt_newest()
        self.manager.check_integrity()

    def step(self) -> list[list[Chunk]]:
        plans = self.fill()
        if self.in_flight:
            self.collect()
        return plans

    def drain(self, max_num_steps: int) -> None:
        for _ in range(max_num_steps + 1):
            if not self.scheduler.has_unfinished:
                break
            self.step()
        assert not self.scheduler.has_unfinished, f"unfinished after {max_num_steps} steps"
        while self.in_flight:
            self.collect()
        assert self.submit() == []
        assert self.scheduler.num_waiting == self.scheduler.num_running == 0
        assert self.manager.num_free_blocks == self.manager.num_blocks
        assert self.rank.sequences == {}
        assert sorted(self.left) == sorted(self.rank.seen), "ranks hear once of the end of what they have seen"
        for sequence in self.sequences:
            assert sequence.status is SequenceStatus.FINISHED
            self.check_output(sequence)

    def with_status(self, status: SequenceStatus) -> list[Sequence]:
        return [sequence for sequence in self.sequences if sequence.status is status]

    def has_last_token(self, sequence: Sequence) -> bool:
        max_tokens = sequence.params.max_tokens
        is_full = max_tokens is not None and len(sequence.output_token_ids) >= max_tokens
        return is_full or sequence.num_tokens >= self.max_model_len

    def awaited(self) -> set[int]:
        """Sequences whose next token, or whose embedding, is on its way."""
        return {c.seq_id for plan, _ in self.in_flight for c in plan.chunks if c.samples or self.is_pooled(c)}

    def is_pooled(self, chunk: ScheduledChunk) -> bool:
        sequence = self.sequences[chunk.seq_id]
        return sequence.pooling is not None and chunk.start + chunk.num_tokens == sequence.num_prompt_tokens

    def check_plan(self, plan: StepPlan, decoding: set[int], prompt_limit: int | None) -> None:
        """decoding: sequences that had one token to run, or wait for, before the plan was made."""
        assert not {chunk.seq_id for chunk in plan.chunks} & self.awaited(), "a sequence runs without its last token"
        decodes = [chunk for chunk in plan.chunks if is_decode(chunk.num_tokens, chunk.samples, chunk.resets_blocks)]
        assert len(decodes) <= decode_share(len(decoding), self.max_in_flight)
        room = max_prompt_tokens(self.config.max_num_batched_tokens, self.max_in_flight)
        if prompt_limit is not None:
            room = min(room, prompt_limit)
        prefills = [chunk for chunk in plan.chunks if chunk.seq_id not in decoding]
        assert plan.num_tokens - len(decodes) <= room
        check_long(prefills, None, self.sequences)
        in_flight = {chunk.seq_id for old, _ in self.in_flight for chunk in old.chunks}
        again = {chunk.seq_id for chunk in plan.chunks if chunk.resets_blocks}
        assert not in_flight & again, "a preempted sequence was admitted before its former life had ended"

    def check_idle(self) -> None:
        """Nothing was planned though the pipeline has room: nobody who runs was ready, nobody who waits could start."""
        awaited = self.awaited()
        assert all(sequence.seq_id in awaited for sequence in self.with_status(SequenceStatus.RUNNING))

    def check_output(self, sequence: Sequence) -> None:
        tokens = sequence.prompt_token_ids
        for token_id in sequence.output_token_ids:
            assert token_id == next_token(tokens, sequence.seed)
            tokens = (*tokens, token_id)
        if sequence.pooling is not None:
            assert not sequence.output_token_ids
        elif sequence.finish_reason is FinishReason.LENGTH:
            assert self.has_last_token(sequence)


def is_decoding(sequence: Sequence) -> bool:
    return sequence.num_tokens - sequence.num_scheduled_tokens <= 1


def is_decode(num_tokens: int, samples: bool, resets_blocks: bool) -> bool:
    """The last token of a prompt that comes alone counts as one, unless it is the first chunk."""
    return num_tokens == 1 and samples and not resets_blocks


def prompts(*lengths: int) -> list[Tokens]:
    """Prompts of these lengths without a common prefix."""
    return [tuple(range(1000 * index, 1000 * index + length)) for index, length in enumerate(lengths, start=1)]


class TestMicroBatches:
    @given(st.integers(1, 100_000), st.integers(1, 16))
    def test_prompt_tokens_of_a_step(self, max_num_batched_tokens: int, max_in_flight: int) -> None:
        room = max_prompt_tokens(max_num_batched_tokens, max_in_flight)
        assert 1 <= room <= max_num_batched_tokens
        if max_in_flight == 1:
            assert room == max_num_batched_tokens
            return
        assert room >= min(MIN_MICRO_BATCH_TOKENS, max_num_batched_tokens)
        if room > MIN_MICRO_BATCH_TOKENS:
            # No larger than it must be for four micro-batches a stage.
            assert (room - 1) * 4 * max_in_flight < max_num_batched_tokens <= room * 4 * max_in_flight

    @given(st.integers(1, 1000), st.integers(1, 16))
    def test_shares_of_decodes_have_room_for_all_and_no_more(self, num_decoding: int, max_in_flight: int) -> None:
        share = decode_share(num_decoding, max_in_flight)
        assert (share - 1) * max_in_flight < num_decoding <= share * max_in_flight


class TestSpreading:
    def test_chunks_of_one_prompt_fill_the_pipeline(self) -> None:
        pipeline = Pipeline(3, max_num_batched_tokens=1024, num_blocks=200)
        pipeline.add(*prompts(400))
        assert pipeline.fill() == [[(0, 0, 128)], [(0, 128, 128)], [(0, 256, 128)]]
        assert pipeline.step() == []
        assert pipeline.step() == [[(0, 384, 16)]]
        assert pipeline.submit() is None, "its first token is on its way"
        pipeline.drain(10)

    def test_large_budgets_make_large_chunks(self) -> None:
        pipeline = Pipeline(2, max_num_batched_tokens=4096, num_blocks=1000)
        pipeline.add(*prompts(990))
        assert pipeline.fill() == [[(0, 0, 512)], [(0, 512, 478)]]
        pipeline.drain(10)

    def test_decodes_are_shared_out_oldest_first(self) -> None:
        pipeline = Pipeline(2)
        for prompt in prompts(3, 3, 3, 3, 3):
            pipeline.add(prompt, max_tokens=9)
        assert pipeline.step() == [[(seq_id, 0, 3) for seq_id in range(5)]]
        first, second = [(0, 3, 1), (1, 3, 1), (2, 3, 1)], [(3, 3, 1), (4, 3, 1)]
        assert pipeline.step() == [first, second]
        assert pipeline.step() == [[(seq_id, 4, 1) for seq_id, _, _ in first]]
        assert pipeline.step() == [[(seq_id, 4, 1) for seq_id, _, _ in second]]
        pipeline.drain(40)

    @pytest.mark.parametrize("max_in_flight", [2, 3, 4])
    def test_one_request_decodes_with_one_plan_in_flight(self, max_in_flight: int) -> None:
        pipeline = Pipeline(max_in_flight)
        pipeline.add((1, 2, 3), max_tokens=5)
        assert [pipeline.step() for _ in range(5)] == [[[(0, 0, 3)]], *([[(0, n, 1)]] for n in (3, 4, 5, 6))]
        assert not pipeline.scheduler.has_unfinished

    def test_decodes_go_on_beside_a_long_prompt(self) -> None:
        pipeline = Pipeline(2, max_num_batched_tokens=1024, num_blocks=200)
        short, long = prompts(2, 600)
        pipeline.add(short, max_tokens=4)
        pipeline.step()
        pipeline.add(long)
        assert pipeline.step() == [[(0, 2, 1), (1, 0, 128)], [(1, 128, 128)]]
        assert pipeline.step() == [[(0, 3, 1), (1, 256, 128)]]
        assert pipeline.step() == [[(1, 384, 128)]]
        assert pipeline.step() == [[(0, 4, 1), (1, 512, 88)]]
        pipeline.drain(20)

    def test_prompt_tokens_are_limited_while_a_token_is_on_its_way(self) -> None:
        pipeline = Pipeline(2, max_num_batched_tokens=1024, num_blocks=200)
        short, long = prompts(2, 600)
        pipeline.add(short, max_tokens=4)
        pipeline.step()
        pipeline.add(long)
        assert pipeline.submit(20) == [(0, 2, 1), (1, 0, 20)]
        assert pipeline.submit(20) == [(1, 20, 20)], "the first one's next token is on its way"
        pipeline.collect()
        pipeline.scheduler.abort(0)
        assert pipeline.submit(20) == [(1, 40, 128)]
        pipeline.drain(20)

    def test_a_short_prompt_runs_beside_a_long_one(self) -> None:
        pipeline = Pipeline(2, max_num_batched_tokens=1024, num_blocks=200)
        pipeline.add(*prompts(600))
        pipeline.submit()
        pipeline.add(tuple(range(5000, 5020)))
        assert pipeline.submit() == [(0, 128, 108), (1, 0, 20)]
        pipeline.drain(20)

    @settings(deadline=None)
    @given(num_seqs=st.integers(1, 9), max_in_flight=st.integers(1, 4))
    def test_steady_decodes_keep_the_pipeline_full_and_take_turns(self, num_seqs: int, max_in_flight: int) -> None:
        pipeline = Pipeline(max_in_flight, max_num_seqs=9, num_blocks=500)
        for prompt in prompts(*[3] * num_seqs):
            pipeline.add(prompt, max_tokens=100)
        pipeline.step()
        for _ in range(3 * max_in_flight):
            pipeline.step()
        num_plans = 0
        last_plan = dict.fromkeys(range(num_seqs), 0)
        for _ in range(10 * max_in_flight):
            for chunks in pipeline.fill():
                num_plans += 1
                for seq_id, _, _ in chunks:
                    assert num_plans - last_plan[seq_id] <= max_in_flight
                    last_plan[seq_id] = num_plans
            # Six sequences give four plans two each: then three are enough.
            share = decode_share(num_seqs, max_in_flight)
            assert len(pipeline.in_flight) == -(-num_seqs // share)
            pipeline.collect()


class TestBlocksInFlight:
    def test_a_prefix_is_found_when_its_step_has_come_back(self) -> None:
        pipeline = Pipeline(2)
        prompt = tuple(range(9))
        pipeline.add(prompt, max_tokens=9)
        pipeline.submit()
        early = pipeline.add(prompt)
        pipeline.submit()
        pipeline.collect()
        late = pipeline.add(prompt)
        pipeline.submit()
        assert (early.num_cached_tokens, late.num_cached_tokens) == (0, 8)
        pipeline.drain(30)

    @pytest.mark.parametrize("enable_prefix_caching", [True, False], ids=["caching", "no_caching"])
    def test_forks_wait_until_the_prompt_has_come_back(self, enable_prefix_caching: bool) -> None:
        pipeline = Pipeline(3, max_num_batched_tokens=8, enable_prefix_caching=enable_prefix_caching)
        (prompt,) = prompts(11)
        first = pipeline.add(prompt)
        forks = [pipeline.add(prompt, forked_from=first) for _ in range(2)]
        assert pipeline.fill() == [[(0, 0, 8)], [(0, 8, 3)]]
        pipeline.collect()
        assert pipeline.submit() is None
        pipeline.collect()
        assert pipeline.submit() == [(0, 11, 1), (1, 8, 3), (2, 8, 3)]
        assert [fork.num_cached_tokens for fork in forks] == [8, 8]
        tables = [pipeline.manager.block_table(seq_id) for seq_id in range(3)]
        assert tables[0][:2] == tables[1][:2] == tables[2][:2]
        pipeline.drain(20)

    def test_blocks_of_an_aborted_sequence_serve_the_next_plan(self) -> None:
        pipeline = Pipeline(2, num_blocks=4)
        dropped, other = (pipeline.add(prompt, max_tokens=3) for prompt in prompts(12, 13))
        assert pipeline.submit() == [(0, 0, 12)]
        pipeline.scheduler.abort(dropped.seq_id)
        assert pipeline.submit() == [(1, 0, 13)]
        pipeline.collect()
        assert dropped.output_token_ids == []
        assert pipeline.manager.num_cached_blocks == 0, "it was not its block any more when the step came back"
        pipeline.drain(20)
        assert len(other.output_token_ids) == 3

    def test_a_preempted_sequence_keeps_the_token_that_was_on_its_way(self) -> None:
        pipeline = Pipeline(2, num_blocks=5, enable_prefix_caching=False)
        old, young = (pipeline.add(prompt, max_tokens=9) for prompt in prompts(7, 8))
        assert pipeline.step() == [[(0, 0, 7), (1, 0, 8)]]
        assert pipeline.step() == [[(0, 7, 1)], [(1, 8, 1)]]
        assert pipeline.submit() == [(0, 8, 1)], "which takes a block of the young one"
        assert pipeline.awaited() == {0, 1}
        assert (young.status, young.num_tokens, young.num_preemptions) == (SequenceStatus.WAITING, 9, 1)
        pipeline.collect()
        assert (young.num_tokens, young.num_scheduled_tokens, young.num_computed_tokens) == (10, 0, 0)
        pipeline.drain(60)
        assert len(old.output_token_ids) == len(young.output_token_ids) == 9

    def test_a_preempted_prompt_is_not_admitted_before_its_chunks_have_come_back(self) -> None:
        """Its chunks in flight would be taken for those of its new blocks."""
        pipeline = Pipeline(4, num_blocks=23, block_size=1, max_num_seqs=2, max_num_batched_tokens=2)
        old, young = (pipeline.add(prompt, max_tokens=4) for prompt in prompts(2, 20))
        assert pipeline.step() == [[(0, 0, 2)], [(1, 0, 2)], [(1, 2, 2)], [(1, 4, 2)]]
        assert pipeline.step() == [[(0, 2, 1), (1, 6, 1)]], "which takes the last free block"
        assert [pipeline.step() for _ in range(3)] == [[[(1, n, 2)]] for n in (7, 9, 11)]
        assert pipeline.submit() == [(0, 3, 1)], "which takes a block of the young one"
        assert (young.status, young.num_scheduled_tokens) == (SequenceStatus.WAITING, 0)
        pipeline.scheduler.abort(old.seq_id)
        for _ in range(3):
            pipeline.collect()
            assert young.num_computed_tokens == 0
            if len(pipeline.in_flight) > 1:
                assert pipeline.submit() is None
        assert pipeline.submit() == [(1, 7, 2)], "the blocks that had come back before are found again"
        pipeline.drain(60)
        assert len(young.output_token_ids) == 4

    def test_finished_and_sampled_are_told_by_the_next_plan_there_is(self) -> None:
        """A call of schedule that finds nothing to do must not lose what ranks have to hear."""
        pipeline = Pipeline(3)
        first, second, third = (pipeline.add(prompt) for prompt in prompts(3, 4, 5))
        assert pipeline.submit() is not None
        pipeline.scheduler.abort(second.seq_id)
        assert pipeline.submit() is None
        pipeline.collect()
        plan = pipeline.scheduler.schedule()
        assert plan is not None
        assert plan.finished == (second.seq_id,)
        assert [seq_id for seq_id, _ in plan.sampled] == [first.seq_id, third.seq_id]


class TestMisuse:
    def test_more_plans_than_allowed(self) -> None:
        pipeline = Pipeline(2, max_num_batched_tokens=8)
        pipeline.add(*prompts(50))
        pipeline.fill()
        with pytest.raises(RuntimeError, match=r"step 1 was planned but not updated; call update\(\)"):
            pipeline.scheduler.schedule()

    def test_plans_updated_in_another_order(self) -> None:
        pipeline = Pipeline(2, max_num_batched_tokens=8)
        pipeline.add(*prompts(50))
        pipeline.fill()
        with pytest.raises(ValueError, match="step 2 was updated, but step 1 is the oldest open one"):
            pipeline.scheduler.update(*pipeline.in_flight[1])

    def test_no_plan_in_flight(self) -> None:
        with pytest.raises(ConfigError, match="max_in_flight is 0"):
            Pipeline(0)


@st.composite
def pipelines(draw: st.DrawFn) -> Pipeline:
    max_num_seqs = draw(st.integers(1, 6))
    return Pipeline(
        draw(st.integers(1, 4)),
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


@settings(deadline=None, max_examples=200)
@given(pipeline=pipelines(), loads=st.lists(st.tuples(random_prompts, st.integers(1, 10)), min_size=1, max_size=8))
def test_everybody_ends(pipeline: Pipeline, loads: list[tuple[Tokens, int]]) -> None:
    """Without forks the oldest computes a token whenever it is free, within max_in_flight steps, and keeps it."""
    max_num_tokens = 0
    for prompt, max_tokens in loads:
        try:
            pipeline.add(prompt, max_tokens)
        except ContextLengthError:
            continue
        max_num_tokens += len(prompt) + max_tokens - 1
    assume(pipeline.sequences)
    pipeline.drain(max_num_tokens * pipeline.max_in_flight)
    assert all(sequence.finish_reason is FinishReason.LENGTH for sequence in pipeline.sequences)


class InFlightMachine(RuleBasedStateMachine):
    """Random arrivals, forks, cancels and failures in a small cache, while plans are made and come back at any time."""

    @initialize(pipeline=pipelines())
    def start(self, pipeline: Pipeline) -> None:
        self.pipeline = pipeline

    @rule(
        prompt=random_prompts,
        max_tokens=st.none() | st.integers(1, 12),
        num_outputs=st.integers(1, 4),
        prompt_logprobs=st.sampled_from([None, None, None, 0]),
    )
    def add(self, prompt: Tokens, max_tokens: int | None, num_outputs: int, prompt_logprobs: int | None) -> None:
        try:
            first = self.pipeline.add(prompt, max_tokens, prompt_logprobs=prompt_logprobs)
        except ContextLengthError:
            return
        for _ in range(num_outputs - 1):
            self.pipeline.add(prompt, max_tokens, prompt_logprobs=prompt_logprobs, forked_from=first)

    @rule(prompt=random_prompts, pooling=st.sampled_from(["last", "mean"]))
    def pool(self, prompt: Tokens, pooling: str) -> None:
        with suppress(ContextLengthError):
            self.pipeline.add(prompt, pooling=PoolingParams(pooling=pooling))  # type: ignore[arg-type]

    @precondition(lambda self: len(self.pipeline.in_flight) < self.pipeline.max_in_flight)
    @rule(prompt_limit=st.none() | st.integers(1, 12))
    def submit(self, prompt_limit: int | None) -> None:
        chunks = self.pipeline.submit(prompt_limit)
        assert chunks or self.pipeline.in_flight or not self.pipeline.scheduler.has_unfinished

    @precondition(lambda self: self.pipeline.in_flight)
    @rule()
    def undo(self) -> None:
        self.pipeline.undo()

    @precondition(lambda self: self.pipeline.in_flight)
    @rule()
    def collect(self) -> None:
        self.pipeline.collect()

    @rule(num_steps=st.integers(1, 8))
    def step(self, num_steps: int) -> None:
        for _ in range(num_steps):
            self.pipeline.step()

    @precondition(lambda self: self.pipeline.sequences)
    @rule(data=st.data(), reason=st.sampled_from([FinishReason.ABORT, FinishReason.ERROR, FinishReason.STOP]))
    def end(self, data: st.DataObject, reason: FinishReason) -> None:
        seq_id = data.draw(st.integers(0, len(self.pipeline.sequences) - 1))
        self.pipeline.scheduler.finish(self.pipeline.sequences[seq_id], reason)
        self.pipeline.manager.check_integrity()

    def teardown(self) -> None:
        pipeline = self.pipeline
        # A fork that becomes the oldest can take back what its forerunner as the oldest had computed.
        num_left = sum(30 for sequence in pipeline.sequences if sequence.status is not SequenceStatus.FINISHED)
        num_forks = sum(sequence.forked_from is not None for sequence in pipeline.sequences)
        pipeline.drain((1 + num_left * (1 + num_forks)) * pipeline.max_in_flight)


InFlightMachine.TestCase.settings = settings(deadline=None, max_examples=150, stateful_step_count=40)
TestInFlightMachine = InFlightMachine.TestCase
