"""One rank: keeps what plans have told it, runs them, samples.

A worker decides nothing. Whoever feeds it the same plans gets the same tokens, in this process or another.
"""

import time
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from headrace.costs.sites import Phase
from headrace.costs.steps import Event
from headrace.costs.volume import totals_of
from headrace.engine.decode_step import DecodeStep
from headrace.engine.device_memory import call_once, is_out_of_memory, release_cached, what_torch_says
from headrace.engine.device_sampler import DeviceSampler
from headrace.engine.exchange_check import ExchangeCheck
from headrace.engine.plan import StepPlan, StepResult
from headrace.engine.pooler import Pooler, PoolingRows
from headrace.engine.prompt_scores import num_rows_of_parts, score_prompt
from headrace.engine.rank_exchanges import RankExchanges
from headrace.engine.rank_statistics import RankStatistics
from headrace.engine.rows import Row
from headrace.engine.runner import ModelRunner
from headrace.engine.sampler import Sampler, SamplingRow
from headrace.engine.sharded_sampler import ShardedSampler
from headrace.engine.trace import MAX_EVENTS, RankTrace, StepEvent
from headrace.engine.worker_sequence import WorkerSequence
from headrace.errors import KernelError, OutOfDeviceMemory
from headrace.parallel.group import Group
from headrace.parallel.ledger import LedgerRow


class Worker:
    """Owns the live sequences of one rank, their block tables included.

    eos_token_ids: the model's end-of-sequence tokens, which `min_tokens` holds back.
    groups: those whose ledgers count by phase.
    tp_group: the ranks that have the logits of this rank's stage together, each those of its shard of the vocabulary;
        gathers_logits: each has them all, see `ParallelConfig.gather_logits`.
    exchanges: what ranks exchange in steps; None without other ranks.
    """

    def __init__(
        self,
        runner: ModelRunner,
        eos_token_ids: frozenset[int],
        groups: Sequence[Group] = (),
        *,
        tp_group: Group | None = None,
        gathers_logits: bool = False,
        exchanges: RankExchanges | None = None,
    ) -> None:
        self.groups = tuple(group for group in groups if group.world_size > 1)
        self._phase: Phase | None = None
        self._exchanges = exchanges
        self._check = None if exchanges is None else exchanges.check
        self._steps: list[StepEvent] | None = None
        """For a trace; None while there is none."""
        self._runner = runner
        self._needs_device = runner.kernels.device.type == "cuda"
        self._sampler = _make_sampler(tp_group, runner, exchanges, gathers_logits=gathers_logits)
        self._pooler = Pooler(runner.last_hidden_states, exchanges.max_undone_steps if exchanges else 0)
        self._eos_token_ids = eos_token_ids
        self._sequences: dict[int, WorkerSequence] = {}

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
        chunk asks for it.

        Raises:
            OutOfDeviceMemory: the step does not fit. What the plan says of sequences is known all the same; none of its
                tokens counts as computed. Other ranks have been given all that they wait for.
        """
        for seq_id, token_id in plan.sampled:
            self._sequences[seq_id].output_token_ids.append(token_id)
        for seq_id in plan.finished:
            del self._sequences[seq_id]
            self._pooler.forget(seq_id)
        for new in plan.new:
            self._sequences[new.seq_id] = WorkerSequence.of(new, self._eos_token_ids)
        if not plan.chunks:
            return StepResult((), {})
        if self._needs_device:
            # Each thread has a GPU of its own to launch on, the first one if it does not say, and callers are many.
            torch.cuda.set_device(self.device)
        try:
            return self._run_checked(plan) if self._steps is None else self._run_traced(plan, self._steps)
        except OutOfDeviceMemory as error:
            reason, is_own = str(error), False
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            reason, is_own = f"a step does not fit the memory of {self.device}: {what_torch_says(error)}", True
        # Here, where the error no longer holds what the step has made.
        release_cached(self.device)
        if self._exchanges is not None:
            self._exchanges.complete(self.fallback_rows, is_own=is_own)
        raise OutOfDeviceMemory(f"{reason}; lower max_num_batched_tokens, or leave more free with memory_fraction")

    def try_to_execute(self, plan: StepPlan) -> StepResult | OutOfDeviceMemory:
        """`execute`, but the error is the answer: one rank's is all ranks', and those that are well go on."""
        try:
            return self.execute(plan)
        except OutOfDeviceMemory as error:
            return error.with_traceback(None)

    def knows_of_all(self, plan: StepPlan) -> bool:
        """Whether `execute` has told whether the plan fitted all ranks, not this one alone: equal on all of them."""
        if self._exchanges is None or not self._exchanges.hollow.tells_all:
            return False
        return any(chunk.samples for chunk in plan.chunks)

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

    def _run_traced(self, plan: StepPlan, steps: list[StepEvent]) -> StepResult:
        start_ns = time.monotonic_ns()
        result = self._run_checked(plan)
        if len(steps) < MAX_EVENTS:
            phase, end_ns = _phase_of(plan), time.monotonic_ns()
            steps.append(StepEvent(plan.step, phase, plan.num_tokens, len(plan.chunks), start_ns, end_ns))
        return result

    def _run_checked(self, plan: StepPlan) -> StepResult:
        rows, sampling = self._rows(plan)
        if self._exchanges is None:
            return self._run(plan, rows, sampling)
        check, reserve = self._exchanges.check, self._exchanges.reserve
        phase = _phase_of(plan)
        self._set_phase(phase)
        check.begin_step(self._events(check, plan, phase, sampling))
        result = self._run(plan, rows, sampling)
        check.end_step(self.fallback_rows)
        # Sampling may have needed it.
        reserve.restore()
        return result

    def _events(
        self, check: ExchangeCheck, plan: StepPlan, phase: Phase, sampling: Sequence[SamplingRow]
    ) -> list[Event]:
        """What the step is about to exchange."""
        runner, num_tokens, num_seqs = self._runner, plan.num_tokens, len(plan.chunks)
        prompt_rows = []
        if runner.has_head:
            for chunk in plan.chunks:
                sequence = self._sequences[chunk.seq_id]
                if sequence.scores_prompt:
                    prompt_rows += num_rows_of_parts(chunk, sequence.new)
        num_logits_rows = runner.num_logits_rows(num_tokens, num_seqs, len(sampling))
        return check.events(phase, runner.num_rows(num_tokens, num_seqs), prompt_rows, sampling, num_logits_rows)

    def _rows(self, plan: StepPlan) -> tuple[list[Row], list[SamplingRow]]:
        """Of all chunks, and, where there are logits, of those that sample, in their order."""
        rows: list[Row] = []
        sampling: list[SamplingRow] = []
        sequences, has_head = self._sequences, self._runner.has_head
        for chunk in plan.chunks:
            sequence = sequences[chunk.seq_id]
            rows.append(sequence.row(chunk))
            if chunk.samples and has_head:
                sampling.append(sequence.sampling)
        if plan.masks:
            masks = dict(plan.masks)
            sampling = [replace(row, mask=masks[row.seq_id]) if row.seq_id in masks else row for row in sampling]
        return rows, sampling

    def _run(self, plan: StepPlan, rows: Sequence[Row], sampling: Sequence[SamplingRow]) -> StepResult:
        if len(sampling) == len(rows) == plan.num_decode_tokens:
            # Each row is the last token of an output: no prompt is to be scored or pooled.
            logits, largest = self._runner.next_logits(rows)
            return self._sampler.sample(logits, sampling, largest)
        hidden_states = self._runner.run(rows)
        if not self._runner.has_head:
            return StepResult((), {})
        return self._sample(plan, hidden_states, sampling)

    def _set_phase(self, phase: Phase) -> None:
        if phase is not self._phase:
            self._phase = phase
            for group in self.groups:
                group.set_phase(phase)

    def _sample(self, plan: StepPlan, hidden_states: Tensor, sampling: Sequence[SamplingRow]) -> StepResult:
        """What the step's hidden states bring: tokens, scored prompts, embeddings."""
        last_rows, prompts, pooling, failed = [], [], [], {}
        row = 0
        for chunk in plan.chunks:
            sequence = self._sequences[chunk.seq_id]
            rows = slice(row, row + chunk.num_tokens)
            if sequence.scores_prompt:
                try:
                    prompts += score_prompt(chunk, sequence.new, hidden_states[rows], self._whole_logits)
                except KernelError as error:
                    failed[chunk.seq_id] = str(error)
            if (params := sequence.new.pooling) is not None:
                num_prompt_tokens = len(sequence.new.prompt_token_ids)
                pooling.append(PoolingRows(chunk, params, num_prompt_tokens, hidden_states[rows]))
            row += chunk.num_tokens
            if chunk.samples:
                last_rows.append(row - 1)
        # Before logits are computed, which a recorded step may put where hidden states are.
        pooled = self._pooler.pool(pooling)
        failed |= pooled.failed
        if not sampling:
            self._pooler.keep(pooled)
            return StepResult((), failed, tuple(prompts), pooled.embeddings)
        if len(last_rows) < row:
            hidden_states = hidden_states[last_rows]
        logits, largest = self._runner.logits(hidden_states)
        result = self._sampler.sample(logits, sampling, largest)
        self._pooler.keep(pooled)
        return StepResult(result.sampled, {**result.failed, **failed}, tuple(prompts), pooled.embeddings)

    def _whole_logits(self, hidden_states: Tensor) -> Tensor:
        return self._sampler.whole_rows(self._runner.logits(hidden_states).logits)


def _phase_of(plan: StepPlan) -> Phase:
    return Phase.DECODE if plan.num_decode_tokens == plan.num_tokens else Phase.PREFILL


def _make_sampler(
    tp_group: Group | None, runner: ModelRunner, exchanges: RankExchanges | None, *, gathers_logits: bool
) -> Sampler | ShardedSampler:
    device_kernels = None if runner.kernels.device.type == "cpu" else runner.kernels
    if tp_group is not None and tp_group.world_size > 1 and not gathers_logits:
        retrying = call_once if exchanges is None else exchanges.reserve.retrying
        return ShardedSampler(tp_group, runner.vocab_size, retrying, device_kernels)
    return Sampler() if device_kernels is None else DeviceSampler(device_kernels)
