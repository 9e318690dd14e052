"""The loop: requests in, steps planned and run, updates out."""

import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from itertools import count
from typing import TYPE_CHECKING, SupportsIndex, TypeVar

from headrace.cache.block_manager import BlockManager
from headrace.config import PoolingParams, SamplingParams
from headrace.engine.engine_counters import EngineCounters
from headrace.engine.grammar_compiler import GrammarCompiler
from headrace.engine.guides import Guides
from headrace.engine.load import LoadedModel
from headrace.engine.metrics import EngineMetrics, EngineStatistics
from headrace.engine.open_requests import OpenRequests
from headrace.engine.outputs import RequestUpdate
from headrace.engine.prompt_pace import make_pace
from headrace.engine.rank_statistics import RankStatistics, exchange_totals
from headrace.engine.request_state import RequestState
from headrace.engine.requests import NO_SAMPLING, checked_token_ids, make_pooling_sequence, make_sequences
from headrace.engine.scheduler import Scheduler
from headrace.engine.sequence import Sequence
from headrace.engine.steps_in_flight import StepsInFlight
from headrace.errors import RequestError

if TYPE_CHECKING:
    from headrace.engine.grammar import Grammar

T = TypeVar("T")


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
        self._requests = OpenRequests(
            self._guides, self._counters, searches_cache=model.plan.cache.enable_prefix_caching
        )
        self._sequence_ids = count()
        plan = model.plan
        self._pace = make_pace(plan.scheduler.max_step_s, plan.cache.block_size, model.executor.max_in_flight)
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
        grammar: "Grammar | None" = None,
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
        updates = self._guarded(self._steps.advance)
        if self._steps.in_flight:
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
        executor = self.model.executor
        self._scheduler = Scheduler(plan.scheduler, self._blocks, executor.max_in_flight)
        self._steps = StepsInFlight(executor, self._scheduler, self._requests, self._guides, self._counters, self._pace)

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

    def _ask_ranks(self, _start_s: float) -> tuple[list[RankStatistics], float]:
        """What they have counted, and the seconds that this one was in exchanges; steps in flight are collected."""
        for update in self._steps.drain():
            self._keep(update)
        return self.model.executor.statistics(), self.model.executor.exchange_s()

    def _drain_if_idle(self) -> None:
        """Wait for plans that nobody waits for: an engine without requests has nothing in flight, so that its ranks can
        be asked for other things."""
        if self._steps.in_flight and not self._requests:
            self._guarded(lambda _: self._steps.give_up())
