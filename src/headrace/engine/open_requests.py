"""Requests from admission to their last update: what steps bring them, and what is reported of that."""

from headrace.engine.engine_counters import EngineCounters
from headrace.engine.guides import Guides
from headrace.engine.output_state import OutputState
from headrace.engine.outputs import CompletionChunk, RequestUpdate
from headrace.engine.plan import StepPlan, StepResult
from headrace.engine.request_state import RequestState
from headrace.engine.scheduler import Scheduler
from headrace.engine.sequence import FinishReason


class OpenRequests:
    """Owns the states of requests and tells the scheduler of sequences that have ended. Whatever comes back from the
    ranks of other sequences is of no interest any more.

    searches_cache: for blocks of prompts. now_s, everywhere: by the clock that requests arrived by.
    """

    def __init__(self, guides: Guides, counters: EngineCounters, *, searches_cache: bool) -> None:
        self._guides = guides
        self._counters = counters
        self._searches_cache = searches_cache
        self._requests: dict[str, RequestState] = {}
        self._by_sequence: dict[int, tuple[RequestState, OutputState]] = {}
        """Of unfinished sequences alone."""

    def __len__(self) -> int:
        return len(self._requests)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._requests

    def add(self, request: RequestState) -> None:
        self._requests[request.request_id] = request
        self._by_sequence |= {output.sequence.seq_id: (request, output) for output in request.outputs}

    def mark_scheduled(self, plan: StepPlan, now_s: float) -> None:
        """Sequences that run for the first time."""
        for new in plan.new:
            request, output = self._by_sequence[new.seq_id]
            is_first = request.mark_scheduled(now_s)
            self._counters.count_scheduled(output.sequence, is_first=is_first, searches_cache=self._searches_cache)

    def take(self, plan: StepPlan, result: StepResult, scheduler: Scheduler, now_s: float) -> list[RequestUpdate]:
        """What a step brought to each request, and to the scheduler. Sequences that have left while it ran are passed
        over."""
        touched: list[RequestState] = []
        if result.failed or result.prompt_logprobs:
            self._take_prompts(result, scheduler, touched)
        scheduler.update(plan, {token.seq_id: token.token_id for token in result.sampled})
        forms = self._guides.take(result.sampled)
        for token in result.sampled:
            found = self._by_sequence.get(token.seq_id)
            if found is None:
                continue
            request, output = found
            if not request.chunks:
                touched.append(request)
            self._counters.num_generation_tokens += 1
            form = forms.get(token.seq_id) if forms else None
            request.append(output, token, now_s, is_complete=form is not None and form.is_complete)
            if output.finish_reason is not None:
                self._end(output, scheduler, output.finish_reason)
            elif form is not None and form.error is not None:
                self.fail(token.seq_id, form.error, scheduler)
        if result.embeddings:
            self._take_embeddings(result, scheduler, touched)
        return [self.update(request, now_s) for request in touched]

    def fail(self, seq_id: int, error: str, scheduler: Scheduler) -> RequestState:
        request, output = self._by_sequence[seq_id]
        request.fail(output, error)
        self._end(output, scheduler, FinishReason.ERROR)
        return request

    def fail_all(self, error: str, now_s: float) -> list[RequestUpdate]:
        """Nothing of them is left."""
        requests = list(self._requests.values())
        for request in requests:
            request.fail_unfinished(error)
        return [self.update(request, now_s) for request in requests]

    def abort(self, request_id: str, scheduler: Scheduler, now_s: float) -> RequestUpdate | None:
        """None if there is no such request any more."""
        request = self._requests.get(request_id)
        if request is None:
            return None
        for output in request.outputs:
            scheduler.finish(output.sequence, FinishReason.ABORT)
        request.abort()
        return self._close(request, (), now_s)

    def update(self, request: RequestState, now_s: float) -> RequestUpdate:
        """What has not been reported of it; with its last output it is closed."""
        chunks, request.chunks = request.chunks, ()
        if request.num_unfinished:
            return RequestUpdate(request.request_id, chunks)
        return self._close(request, chunks, now_s)

    def _take_prompts(self, result: StepResult, scheduler: Scheduler, touched: list[RequestState]) -> None:
        """Those that were scored, and those of which nothing came."""
        for prompt in result.prompt_logprobs:
            if prompt.seq_id in self._by_sequence:
                self._by_sequence[prompt.seq_id][0].add_prompt_logprobs(prompt)
        for seq_id, error in result.failed.items():
            if seq_id in self._by_sequence:
                _note(self.fail(seq_id, error, scheduler), touched)

    def _take_embeddings(self, result: StepResult, scheduler: Scheduler, touched: list[RequestState]) -> None:
        for embedding in result.embeddings:
            if embedding.seq_id not in self._by_sequence:
                continue
            request, output = self._by_sequence[embedding.seq_id]
            request.take_embedding(output, embedding)
            _note(request, touched)
            self._end(output, scheduler, FinishReason.STOP)

    def _end(self, output: OutputState, scheduler: Scheduler, reason: FinishReason) -> None:
        seq_id = output.sequence.seq_id
        del self._by_sequence[seq_id]
        self._guides.drop(seq_id)
        scheduler.finish(output.sequence, reason)

    def _close(self, request: RequestState, chunks: tuple[CompletionChunk, ...], now_s: float) -> RequestUpdate:
        """The last update of a request; nothing of it stays behind."""
        del self._requests[request.request_id]
        for output in request.outputs:
            seq_id = output.sequence.seq_id
            self._by_sequence.pop(seq_id, None)
            self._guides.drop(seq_id)
        finished = request.finish(now_s=now_s)
        self._counters.count_finished(finished)
        return RequestUpdate(request_id=request.request_id, chunks=chunks, finished=finished)


def _note(request: RequestState, touched: list[RequestState]) -> None:
    """It has got a chunk, its first one perhaps."""
    if len(request.chunks) == 1:
        touched.append(request)
