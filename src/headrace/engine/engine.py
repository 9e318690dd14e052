"""The loop: requests in, steps planned and run, updates out."""

import logging
import time
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import replace
from itertools import count
from typing import SupportsIndex, TypeVar

from headrace.cache.block_manager import BlockManager
from headrace.config import PoolingParams, SamplingParams
from headrace.engine.engine_counters import EngineCounters
from headrace.engine.grammar import Grammar, GrammarCompiler
from headrace.engine.guides import Guides
from headrace.engine.load import LoadedModel
from headrace.engine.metrics import EngineMetrics, EngineStatistics
from headrace.engine.open_requests import OpenRequests
from headrace.engine.outputs import RequestUpdate
from headrace.engine.plan import StepPlan
from headrace.engine.prompt_pace import PromptPace
from headrace.engine.rank_statistics import RankStatistics, exchange_totals
from headrace.engine.request_state import RequestState
from headrace.engine.requests import NO_SAMPLING, checked_token_ids, make_pooling_sequence, make_sequences
from headrace.engine.scheduler import Scheduler
from headrace.engine.sequence import Sequence
from headrace.errors import OutOfDeviceMemory, RequestError

T = TypeVar("T")

logger = logging.getLogger(__name__)


class Engine:
    """Owns the queue, the cache and the model; knows nothing about prompts' origin or who reads the output.

    One thread drives it: `add_request` and `abort` between steps, `step` until nothing is unfinished. It must not be
    entered from two threads, or from a signal handler, at the same time.
    """

    def __init__(self, model: LoadedModel) -> None:
        self.model = model
        self._pending: dict[str, RequestUpdate] = {}
        """News that no step has reported yet, by request."""
        self._counters = EngineCounters(started_s=time.monotonic())
        self.grammar_compiler = GrammarCompiler(model.tokenizer, model.config.vocab_size, model.eos_token_ids)
        """May be called from other threads, before `add_request` is."""
        self._guides = Guides(self.grammar_compiler)
        self._requests = OpenRequests(self._guides, self._counters)
        self._sequence_ids = count()
        self._pace = _make_pace(model)
        self._start_afresh()

    @property
    def has_unfinished(self) -> bool:
        """Requests to run, or the end of one to report."""
        return bool(self._requests or self._pending)

    @property
    def failure(self) -> str | None:
        """Why the ranks can no longer work together, once that is so, met by a step or not. From any thread."""
        return self.model.executor.failure

    @property
    def silence(self) -> tuple[str, float]:
        """The rank that has shown no sign of life for the longest time, and for how many seconds. From any thread."""
        return self.model.executor.silence

    def is_live(self, request_id: str) -> bool:
        """The request still has an update to come."""
        return request_id in self._requests or request_id in self._pending

    def add_request(
        self,
        request_id: str,
        prompt_token_ids: Iterable[SupportsIndex],
        params: SamplingParams,
        prompt: str | None = None,
        grammar: Grammar | None = None,
    ) -> None:
        """Queue a request, or refuse it and leave everything as it was.

        grammar: what params.structured_outputs asks for, if it has been compiled before.

        Raises:
            RequestError: an id in use, an empty prompt, token ids outside the vocabulary, a form that cannot be had.
            ContextLengthError: prompt and output could never fit the model or the cache.
        """
        token_ids = self._checked_token_ids(prompt_token_ids, params)
        grammar = self._guides.compile(params, grammar)
        sequences = make_sequences(request_id, token_ids, params, self._sequence_ids)
        self._queue(request_id, sequences, params, prompt)
        if grammar is not None:
            self._guides.add(sequences, grammar)

    def add_pooling_request(
        self,
        request_id: str,
        prompt_token_ids: Iterable[SupportsIndex],
        params: PoolingParams,
        prompt: str | None = None,
    ) -> None:
        """Queue a prompt of which an embedding is to be made: `RequestOutput.embedding` of its only update.

        Raises: see `add_request`.
        """
        token_ids = self._checked_token_ids(prompt_token_ids, NO_SAMPLING)
        sequence = make_pooling_sequence(request_id, token_ids, params, self._sequence_ids)
        self._queue(request_id, [sequence], NO_SAMPLING, prompt)

    def check_request(self, prompt_token_ids: Iterable[SupportsIndex], params: SamplingParams | PoolingParams) -> None:
        """Refuse what `add_request` or `add_pooling_request` would refuse of these. Changes nothing, and may be called
        from any thread.

        Raises: see `add_request`.
        """
        sampling = params if isinstance(params, SamplingParams) else NO_SAMPLING
        max_tokens = sampling.max_tokens if sampling is params else 0
        if isinstance(prompt_token_ids, list | tuple):
            # Before each of what may be millions of tokens is looked at.
            self._scheduler.limits.check_fits(len(prompt_token_ids), max_tokens)
        token_ids = self._checked_token_ids(prompt_token_ids, sampling)
        self._scheduler.limits.check_fits(len(token_ids), max_tokens)

    @property
    def max_num_tokens(self) -> int:
        """What prompt and output of one request may have at most: the model's length, or what the cache holds."""
        return self._scheduler.limits.max_num_tokens

    def abort(self, request_id: str) -> RequestUpdate | None:
        """Drop a request in whatever state it is; None if it has already finished."""
        update = self._requests.abort(request_id, self._scheduler, time.monotonic())
        if update is not None:
            self._pending.pop(request_id, None)
            self._drain_if_idle()
        return update

    def step(self) -> list[RequestUpdate]:
        """Let the ranks have as many steps as they can run at the same time, and say what the oldest brought to each
        request.

        A step that does not fit a device's memory brings nothing, nor do those begun after it: the request that arrived
        last is preempted. If there is but one, its step is tried once more, and then it fails.

        A step that raises (Ctrl-C, say) ends every request with that error, reported by the next step; the engine is
        then empty and takes new ones. With other ranks it takes none: they have ended.
        """
        if self._pending:
            pending, self._pending = self._pending, {}
            return list(pending.values())
        updates = self._guarded(self._advance)
        if self._in_flight:
            self._drain_if_idle()
        return updates

    def close(self) -> None:
        """End the ranks and let go of the model."""
        no_weights = replace(self.model.linear_weights, by_shape={})
        self.model = replace(self.model, linear_weights=no_weights, mixtures=None)
        self.model.executor.close()

    def metrics(self) -> EngineMetrics:
        """Counters of this engine, which cost nothing to read."""
        return self._counters.metrics(time.monotonic(), self._scheduler, self._blocks)

    def statistics(self) -> EngineStatistics:
        """What all ranks have counted. Asking them takes a millisecond or two, and the steps of a pipeline that are in
        flight are waited for; the next step reports what they brought.

        Raises:
            RankError: a rank was lost; as from a step.
        """
        ranks, exchange_s = self._guarded(self._ask_ranks)
        return EngineStatistics(
            metrics=self.metrics(),
            cache=self.model.plan.cache,
            exchange_s=exchange_s,
            exchanges=exchange_totals(ranks),
            num_softmax_rows=sum(rank.num_softmax_rows for rank in ranks),
            num_recomputed_rows=sum(rank.num_recomputed_rows for rank in ranks),
        )

    def check_integrity(self) -> None:
        """Raise AssertionError if the block manager's invariants do not hold."""
        self._blocks.check_integrity()

    def _start_afresh(self) -> None:
        """An empty cache and an empty line."""
        plan = self.model.plan
        self._blocks = BlockManager(plan.num_blocks, plan.cache.block_size, plan.cache.enable_prefix_caching)
        self._scheduler = Scheduler(plan.scheduler, self._blocks, self.model.executor.max_in_flight)
        self._in_flight: deque[StepPlan] = deque()
        self._is_last_try = False
        """A step of one request has found no room, and is about to be tried again."""

    def _keep(self, update: RequestUpdate) -> None:
        """For the next step to report, with what it is to report of the same request already."""
        earlier = self._pending.get(update.request_id)
        chunks = update.chunks if earlier is None else earlier.chunks + update.chunks
        self._pending[update.request_id] = update._replace(chunks=chunks)

    def _guarded(self, work: Callable[[float], T]) -> T:
        """work is timed, and an error in it ends every request. It is told when it began.

        A call rather than a context manager, which would cost several at every step.
        """
        start_s = time.monotonic()
        try:
            return work(start_s)
        except BaseException as error:
            # Which ranks saw how much of the plans is unknown: nothing of them can be kept.
            self._fail_all(f"the step was cut short: {type(error).__name__}: {error}")
            raise
        finally:
            self._counters.busy_s += time.monotonic() - start_s

    def _fail_all(self, error: str) -> None:
        for update in self._requests.fail_all(error, time.monotonic()):
            self._keep(update)
        self._counters.num_preemptions += self._scheduler.num_preemptions
        self._start_afresh()
        self.model.executor.reset()

    def _queue(self, request_id: str, sequences: list[Sequence], params: SamplingParams, prompt: str | None) -> None:
        if self.is_live(request_id):
            raise RequestError(f"request id '{request_id}' is in use; give each request its own")
        state = RequestState(request_id, prompt, sequences, params, self.model, arrival_s=time.monotonic())
        # Siblings differ in nothing that admission looks at: if the first is accepted, all are.
        for sequence in sequences:
            self._scheduler.add(sequence)
        self._requests.add(state)

    def _checked_token_ids(self, values: Iterable[SupportsIndex], params: SamplingParams) -> tuple[int, ...]:
        has_tokenizer = self.model.tokenizer is not None
        return checked_token_ids(values, params, self.model.config.vocab_size, has_tokenizer=has_tokenizer)

    def _advance(self, start_s: float) -> list[RequestUpdate]:
        """What the oldest step brings, when the ranks have as many as they can run at the same time."""
        self._fill_pipeline()
        return self._collect(self._in_flight.popleft(), start_s)

    def _fill_pipeline(self) -> None:
        in_flight, executor = self._in_flight, self.model.executor
        while len(in_flight) < executor.max_in_flight:
            plan = self._scheduler.schedule(None if self._pace is None else self._pace.limit)
            if plan is None:
                return
            if plan.new:
                searches_cache = self.model.plan.cache.enable_prefix_caching
                self._requests.mark_scheduled(plan, time.monotonic(), searches_cache=searches_cache)
            plan = self._guides.masked(plan)
            executor.submit(plan)
            in_flight.append(plan)
            if not plan.chunks:
                return

    def _collect(self, plan: StepPlan, start_s: float | None = None) -> list[RequestUpdate]:
        """start_s: since when its ranks had nothing else to do for it; None if that is not known."""
        try:
            result = self.model.executor.collect()
        except OutOfDeviceMemory as error:
            return self._make_room(plan, str(error))
        self._is_last_try = False
        if self._pace is not None and start_s is not None:
            self._pace.record(plan.num_prefill_tokens, time.monotonic() - start_s)
        self._counters.count_step(plan)
        return self._requests.take(plan, result, self._scheduler, time.monotonic())

    def _ask_ranks(self, _start_s: float) -> tuple[list[RankStatistics], float]:
        """What they have counted, and the seconds that this one was in exchanges; steps in flight are collected."""
        while self._in_flight:
            for update in self._collect(self._in_flight.popleft()):
                self._keep(update)
        return self.model.executor.statistics(), self.model.executor.exchange_s()

    def _make_room(self, plan: StepPlan, reason: str) -> list[RequestUpdate]:
        """Undo a plan that did not fit, and those that were begun after it: they may attend to what it left undone."""
        self._scheduler.undo([plan, *self._collect_rest()])
        if self._scheduler.preempt_newest():
            logger.warning("%s; the newest of %d requests waits", reason, len(self._requests))
            return []
        if not self._scheduler.num_running:
            # Whoever it was for has left.
            return []
        if not self._is_last_try:
            # What torch had kept of the device's memory is free now, and in fewer pieces.
            self._is_last_try = True
            return []
        self._is_last_try = False
        failed = self._requests.fail(self._scheduler.oldest_running.seq_id, reason, self._scheduler)
        return [self._requests.update(failed, time.monotonic())]

    def _undo_rest(self, _start_s: float) -> None:
        self._scheduler.undo(self._collect_rest())

    def _collect_rest(self) -> list[StepPlan]:
        """All plans in flight, whose results nobody wants."""
        rest = list(self._in_flight)
        self._in_flight.clear()
        for _ in rest:
            with suppress(OutOfDeviceMemory):
                self.model.executor.collect()
        return rest

    def _drain_if_idle(self) -> None:
        """Wait for plans that nobody waits for: an engine without requests has nothing in flight, so that its ranks can
        be asked for other things."""
        if not self._in_flight or self._requests:
            return
        self._guarded(self._undo_rest)


def _make_pace(model: LoadedModel) -> PromptPace | None:
    plan = model.plan
    if plan.scheduler.max_step_s is None:
        return None
    return PromptPace(plan.scheduler.max_step_s, plan.cache.block_size, model.executor.max_in_flight)
