"""One rank: keeps what plans have told it, runs them, samples.

A worker decides nothing. Whoever feeds it the same plans gets the same tokens, in this process or another.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from headrace.costs.sites import Phase
from headrace.costs.steps import Event
from headrace.costs.volume import totals_of
from headrace.engine.block_table import BlockTable
from headrace.engine.decode_step import DecodeStep
from headrace.engine.device_sampler import DeviceSampler
from headrace.engine.exchange_check import ExchangeCheck
from headrace.engine.logprobs import prompt_logprobs
from headrace.engine.plan import NewSequence, PromptLogprobs, ScheduledChunk, StepPlan, StepResult
from headrace.engine.pooler import NOTHING_POOLED, Pooler, PoolingRows
from headrace.engine.rank_statistics import RankStatistics
from headrace.engine.rows import Row
from headrace.engine.runner import ModelRunner
from headrace.engine.sampler import Sampler, SamplingRow
from headrace.engine.sharded_sampler import ShardedSampler
from headrace.engine.trace import MAX_EVENTS, RankTrace, StepEvent
from headrace.errors import KernelError
from headrace.parallel.group import Group
from headrace.parallel.ledger import LedgerRow

PROMPT_LOGITS_ROWS = 64
"""Prompt positions whose logits exist at once: 64 rows of 128 Ki entries are 32 MiB of float32."""


@dataclass(kw_only=True, slots=True)
class _WorkerSequence:
    """sampling: what the sampler sees of the sequence; its output_token_ids are the list here, which grows."""

    new: NewSequence
    scores_prompt: bool
    output_token_ids: list[int]
    sampling: SamplingRow
    block_table: BlockTable = field(default_factory=BlockTable)

    def tokens(self, start: int, stop: int) -> Sequence[int]:
        prompt = self.new.prompt_token_ids
        if start >= len(prompt):
            return self.output_token_ids[start - len(prompt) : stop - len(prompt)]
        return (*prompt[start:stop], *self.output_token_ids[: max(stop - len(prompt), 0)])


class Worker:
    """Owns the live sequences of one rank, their block tables included.

    eos_token_ids: the model's end-of-sequence tokens, which `min_tokens` holds back.
    groups: those whose ledgers count by phase.
    tp_group: the ranks that have the logits of this rank's stage together, each those of its shard of the vocabulary;
        gathers_logits: each has them all, see `ParallelConfig.gather_logits`.
    check: of what the groups exchange, fed with every step; None without other ranks.
    """

    def __init__(
        self,
        runner: ModelRunner,
        eos_token_ids: frozenset[int],
        groups: Sequence[Group] = (),
        *,
        tp_group: Group | None = None,
        gathers_logits: bool = False,
        check: ExchangeCheck | None = None,
    ) -> None:
        self.groups = tuple(group for group in groups if group.world_size > 1)
        self._phase: Phase | None = None
        self._check = check
        self._steps: list[StepEvent] | None = None
        """For a trace; None while there is none."""
        self._runner = runner
        self._needs_device = runner.kernels.device.type == "cuda"
        self._sampler = _make_sampler(tp_group, runner, gathers_logits)
        self._pooler = Pooler(runner.last_hidden_states)
        self._eos_token_ids = eos_token_ids
        self._sequences: dict[int, _WorkerSequence] = {}

    @property
    def device(self) -> torch.device:
        return self._runner.kernels.device

    @property
    def decode_step(self) -> DecodeStep:
        return self._runner.decode_step

    @property
    def fallback_rows(self) -> int:
        """Rows of logits gathered so far because their candidates did not suffice."""
        return self._sampler.fallback_rows

    def execute(self, plan: StepPlan) -> StepResult:
        """Run a step: take in the last one's tokens, forget who left, meet who is new, run every chunk, sample where a
        chunk asks for it."""
        for seq_id, token_id in plan.sampled:
            self._sequences[seq_id].output_token_ids.append(token_id)
        for seq_id in plan.finished:
            del self._sequences[seq_id]
            self._pooler.forget(seq_id)
        for new in plan.new:
            self._sequences[new.seq_id] = self._sequence(new)
        if not plan.chunks:
            return StepResult(sampled=(), prompt_logprobs=(), failed={})
        if self._needs_device:
            # Each thread has a GPU of its own to launch on, the first one if it does not say, and callers are many.
            torch.cuda.set_device(self.device)
        if self._steps is None:
            return self._run_checked(plan)
        start_ns = time.monotonic_ns()
        result = self._run_checked(plan)
        if len(self._steps) < MAX_EVENTS:
            phase, end_ns = _phase_of(plan), time.monotonic_ns()
            self._steps.append(StepEvent(plan.step, phase, plan.num_tokens, len(plan.chunks), start_ns, end_ns))
        return result

    def start_trace(self) -> None:
        """Keep steps and exchanges one by one from now on."""
        self._steps = []
        for group in self.groups:
            group.start_trace(MAX_EVENTS)

    def take_trace(self, name: str) -> RankTrace:
        """What was kept since the last time; name: of this rank, for people."""
        steps, self._steps = self._steps or [], [] if self._steps is not None else None
        exchanges = [event for group in self.groups for event in group.drain_trace()]
        return RankTrace(
            name=name,
            steps=steps,
            exchanges=sorted(exchanges, key=lambda event: event.start_ns),
            num_dropped=sum(group.num_dropped_events for group in self.groups),
        )

    def ledger_rows(self) -> list[LedgerRow]:
        """What this rank has exchanged so far."""
        return [row for group in self.groups for row in group.ledger_rows()]

    def statistics(self) -> RankStatistics:
        """What this rank has counted so far, and what its plans predict."""
        softmax = self._runner.softmax_counts()
        return RankStatistics(
            counted=totals_of(self.ledger_rows()),
            predicted={} if self._check is None else self._check.predicted(),
            num_softmax_rows=softmax.num_rows,
            num_recomputed_rows=softmax.num_recomputed_rows,
        )

    def check_exchanges(self) -> None:
        """Compare what has not been compared yet; a difference is an error in the log."""
        if self._check is not None:
            self._check.compare()

    def exchange_differences(self) -> list[str]:
        """Where the ledger of this rank differs from what its plans predict: one line for each figure."""
        return [] if self._check is None else self._check.differences()

    def reset(self) -> None:
        """Forget every sequence, as after a step that failed half way."""
        self._sequences.clear()
        self._pooler.reset()

    def _run_checked(self, plan: StepPlan) -> StepResult:
        sampling = self._sampling_rows(plan) if self._runner.has_head else []
        if self._check is None:
            return self._run(plan, sampling)
        phase = _phase_of(plan)
        self._set_phase(phase)
        self._check.begin_step(self._events(plan, phase, sampling))
        result = self._run(plan, sampling)
        self._check.end_step(self.fallback_rows)
        return result

    def _events(self, plan: StepPlan, phase: Phase, sampling: Sequence[SamplingRow]) -> list[Event]:
        """What the step is about to exchange."""
        assert self._check is not None, "without other ranks nothing is exchanged"
        runner, num_tokens, num_seqs = self._runner, plan.num_tokens, len(plan.chunks)
        prompt_rows = []
        if runner.has_head:
            for chunk in plan.chunks:
                sequence = self._sequences[chunk.seq_id]
                if sequence.scores_prompt:
                    prompt_rows += [len(part) for part in _in_parts(_scored_tokens(chunk, sequence))]
        num_logits_rows = runner.num_logits_rows(num_tokens, num_seqs, len(sampling))
        return self._check.events(phase, runner.num_rows(num_tokens, num_seqs), prompt_rows, sampling, num_logits_rows)

    def _sampling_rows(self, plan: StepPlan) -> list[SamplingRow]:
        """Of the chunks that sample, in their order."""
        masks = dict(plan.masks)
        rows = []
        for chunk in plan.chunks:
            if chunk.samples:
                row, mask = self._sequences[chunk.seq_id].sampling, masks.get(chunk.seq_id)
                rows.append(row if mask is None else replace(row, mask=mask))
        return rows

    def _run(self, plan: StepPlan, sampling: Sequence[SamplingRow]) -> StepResult:
        hidden_states = self._runner.run([self._row(chunk) for chunk in plan.chunks])
        if not self._runner.has_head:
            return StepResult(sampled=(), prompt_logprobs=(), failed={})
        return self._sample(plan, hidden_states, sampling)

    def _set_phase(self, phase: Phase) -> None:
        if phase is not self._phase:
            self._phase = phase
            for group in self.groups:
                group.set_phase(phase)

    def _sequence(self, new: NewSequence) -> _WorkerSequence:
        output_token_ids: list[int] = []
        sampling = SamplingRow(
            seq_id=new.seq_id,
            params=new.params,
            seed=new.seed,
            prompt_token_ids=new.prompt_token_ids,
            output_token_ids=output_token_ids,
            eos_token_ids=self._eos_token_ids,
        )
        return _WorkerSequence(
            new=new,
            scores_prompt=new.params.prompt_logprobs is not None,
            output_token_ids=output_token_ids,
            sampling=sampling,
        )

    def _row(self, chunk: ScheduledChunk) -> Row:
        sequence = self._sequences[chunk.seq_id]
        if chunk.resets_blocks:
            sequence.block_table.clear()
        if chunk.new_block_ids:
            sequence.block_table.extend(chunk.new_block_ids)
        token_ids = sequence.tokens(chunk.start, chunk.start + chunk.num_tokens)
        return Row(token_ids, chunk.start, sequence.block_table.ids)

    def _sample(self, plan: StepPlan, hidden_states: Tensor, sampling: Sequence[SamplingRow]) -> StepResult:
        """What the step's hidden states bring: tokens, scored prompts, embeddings."""
        last_rows, prompts, pooling, failed = [], [], [], {}
        row = 0
        for chunk in plan.chunks:
            sequence = self._sequences[chunk.seq_id]
            rows = slice(row, row + chunk.num_tokens)
            if sequence.scores_prompt:
                try:
                    prompts += self._prompt_logprobs(chunk, sequence, hidden_states[rows])
                except KernelError as error:
                    failed[chunk.seq_id] = str(error)
            if (params := sequence.new.pooling) is not None:
                num_prompt_tokens = len(sequence.new.prompt_token_ids)
                pooling.append(PoolingRows(chunk, params, num_prompt_tokens, hidden_states[rows]))
            row += chunk.num_tokens
            if chunk.samples:
                last_rows.append(row - 1)
        # Before logits are computed, which a recorded step may put where hidden states are.
        pooled = self._pooler.pool(pooling) if pooling else NOTHING_POOLED
        failed |= pooled.failed
        if not sampling:
            self._pooler.keep(pooled)
            return StepResult((), tuple(prompts), failed, pooled.embeddings)
        # In a decode step every row is a last row.
        if len(last_rows) < row:
            hidden_states = hidden_states[last_rows]
        logits, largest = self._runner.logits(hidden_states)
        outcome = self._sampler.sample(logits, sampling, largest)
        self._pooler.keep(pooled)
        return StepResult(outcome.sampled, tuple(prompts), {**outcome.failed, **failed}, pooled.embeddings)

    def _prompt_logprobs(
        self, chunk: ScheduledChunk, sequence: _WorkerSequence, hidden_states: Tensor
    ) -> list[PromptLogprobs]:
        """Row i of the chunk scores the prompt token after it; the last prompt token scores none.

        What is exchanged for it follows from the plan alone: rows that cannot be used are gathered like others.
        """
        num_top = sequence.new.params.prompt_logprobs
        assert num_top is not None
        found, offset, failure = [], 0, None
        for part in _in_parts(_scored_tokens(chunk, sequence)):
            logits = self._runner.logits(hidden_states[offset : offset + len(part)]).logits
            whole = self._sampler.whole_rows(logits)
            try:
                rows = prompt_logprobs(whole, part, num_top)
                found.append(PromptLogprobs(seq_id=chunk.seq_id, start=chunk.start + offset + 1, rows=rows))
            except KernelError as error:
                failure = failure or error
            offset += len(part)
        if failure is not None:
            raise failure
        return found


def _scored_tokens(chunk: ScheduledChunk, sequence: _WorkerSequence) -> Sequence[int]:
    return sequence.new.prompt_token_ids[chunk.start + 1 : chunk.start + chunk.num_tokens + 1]


def _in_parts(token_ids: Sequence[int]) -> Iterator[Sequence[int]]:
    return (token_ids[start : start + PROMPT_LOGITS_ROWS] for start in range(0, len(token_ids), PROMPT_LOGITS_ROWS))


def _phase_of(plan: StepPlan) -> Phase:
    return Phase.DECODE if plan.num_decode_tokens == plan.num_tokens else Phase.PREFILL


def _make_sampler(tp_group: Group | None, runner: ModelRunner, gathers_logits: bool) -> Sampler | ShardedSampler:
    if tp_group is not None and tp_group.world_size > 1 and not gathers_logits:
        return ShardedSampler(tp_group, runner.vocab_size)
    return Sampler() if runner.kernels.device.type == "cpu" else DeviceSampler(runner.kernels)
