"""The steps of a run, as far as what ranks exchange depends on them."""

from collections import Counter, deque
from dataclasses import dataclass

from headrace.config.checks import check_at_least_one
from headrace.costs.candidates import LARGEST_WORDS, WORD_BYTES
from headrace.costs.micro_batches import decode_share, max_prompt_tokens
from headrace.costs.sites import Phase
from headrace.errors import ConfigError


@dataclass(frozen=True, slots=True)
class ForwardPass:
    """Tokens that pass through the layers together: one step of one micro-batch."""

    phase: Phase
    num_tokens: int


@dataclass(frozen=True, slots=True)
class SampledRows:
    """Rows of logits from which one step samples.

    candidate_bytes: of the candidates that each rank brings, and draw_bytes of the tokens that the rank which has them
        tells the others, as `candidates` says for the rows' parameters.
    """

    phase: Phase
    num_rows: int
    candidate_bytes: int
    draw_bytes: int = 0


@dataclass(frozen=True, slots=True)
class WholeRows:
    """Rows of logits that each rank needs whole at once: prompts that are scored, and rows whose candidates do not
    suffice."""

    phase: Phase
    num_rows: int


Event = ForwardPass | SampledRows | WholeRows
Run = Counter[Event]
"""How often each has occurred: all that what ranks exchange depends on. There are few different ones, however long the
run."""

GREEDY_ROW_BYTES = WORD_BYTES * LARGEST_WORDS
"""Candidate bytes of a row that takes the most likely token."""


@dataclass(frozen=True, kw_only=True)
class RequestShape:
    """batch_size requests of prompt_tokens, each of which generates output_tokens."""

    prompt_tokens: int
    output_tokens: int
    batch_size: int = 1

    def __post_init__(self) -> None:
        for name in ("prompt_tokens", "output_tokens", "batch_size"):
            check_at_least_one(name, getattr(self, name))

    @property
    def num_tokens(self) -> int:
        """Tokens that pass through the model, S_p + S_d - 1 for each request: the last one is sampled but never run."""
        return self.batch_size * (self.prompt_tokens + self.output_tokens - 1)


def request_run(request: RequestShape, max_num_batched_tokens: int, max_in_flight: int = 1) -> Run:
    """The steps of a batch that arrives at once, max_in_flight of them running at a time (one for each stage).

    One request: ceil(S_p / max_prompt_tokens) steps of prefill and S_d - 1 of decode. Several: the scheduler's rules,
    gone through step by step. Holds for prompts that share no prefix, a cache with room for all, and greedy sampling.

    Raises:
        ConfigError: max_num_batched_tokens has no room for one token of each request.
    """
    if max_num_batched_tokens < request.batch_size:
        raise ConfigError(
            f"max_num_batched_tokens is {max_num_batched_tokens}, but a step must have room for one token of each of "
            f"{request.batch_size} requests; allowed: {request.batch_size} and more"
        )
    if request.batch_size > 1:
        return _BatchReplay(request, max_num_batched_tokens, max_in_flight).run()
    return _one_request(request, max_prompt_tokens(max_num_batched_tokens, max_in_flight))


def _one_request(request: RequestShape, chunk_tokens: int) -> Run:
    num_whole, rest = divmod(request.prompt_tokens - 1, chunk_tokens)
    run: Run = Counter()
    run[ForwardPass(Phase.PREFILL, chunk_tokens)] += num_whole
    run[ForwardPass(Phase.PREFILL, rest + 1)] += 1
    run[SampledRows(Phase.PREFILL, 1, GREEDY_ROW_BYTES)] += 1
    run[ForwardPass(Phase.DECODE, 1)] += request.output_tokens - 1
    run[SampledRows(Phase.DECODE, 1, GREEDY_ROW_BYTES)] += request.output_tokens - 1
    return +run


class _BatchReplay:
    """What `engine.scheduler` does with a batch, by counters alone.

    A step takes a share of the requests that generate and whose last token is known, then a budget of prompt tokens in
    order of arrival; a request's next token is known when the step that samples it has come back.
    """

    def __init__(self, request: RequestShape, max_num_batched_tokens: int, max_in_flight: int) -> None:
        self._max_num_batched_tokens = max_num_batched_tokens
        self._max_prompt_tokens = max_prompt_tokens(max_num_batched_tokens, max_in_flight)
        self._max_in_flight = max_in_flight
        self._unplanned = [request.prompt_tokens] * request.batch_size  # tokens whose turn has not come
        self._outputs_left = [request.output_tokens] * request.batch_size
        self._is_prompt = [True] * request.batch_size
        self._running: list[int] = []
        self._num_started = 0
        self._run: Run = Counter()

    def run(self) -> Run:
        in_flight: deque[list[int]] = deque()
        while self._running or self._num_started < len(self._unplanned):
            while len(in_flight) < self._max_in_flight and (sampled := self._plan()) is not None:
                in_flight.append(sampled)
            for index in in_flight.popleft():
                self._outputs_left[index] -= 1
                self._is_prompt[index] = False
                self._unplanned[index] = 1
            self._running = [index for index in self._running if self._outputs_left[index]]
        return self._run

    def _plan(self) -> list[int] | None:
        """The requests that the next step samples, None if all there is to do waits for steps in flight."""
        single = [index for index in self._running if self._unplanned[index] <= 1]
        share = decode_share(len(single), self._max_in_flight)
        sampled = [index for index in single if self._unplanned[index]][:share]
        num_decodes = len(sampled)
        has_prompt = any(self._is_prompt[index] for index in sampled)
        room = min(self._max_num_batched_tokens - num_decodes, self._max_prompt_tokens)
        num_prompt_tokens = 0
        for index in self._prefilling():
            if num_prompt_tokens == room:
                break
            if index == self._num_started:
                self._running.append(index)
                self._num_started += 1
            taken = min(self._unplanned[index], room - num_prompt_tokens)
            num_prompt_tokens += taken
            self._unplanned[index] -= taken
            if not self._unplanned[index]:
                sampled.append(index)
        for index in sampled:
            self._unplanned[index] = 0
        if not num_decodes + num_prompt_tokens:
            return None
        phase = Phase.PREFILL if has_prompt or num_prompt_tokens else Phase.DECODE
        self._run[ForwardPass(phase, num_decodes + num_prompt_tokens)] += 1
        if sampled:
            self._run[SampledRows(phase, len(sampled), len(sampled) * GREEDY_ROW_BYTES)] += 1
        return sampled

    def _prefilling(self) -> list[int]:
        started = [index for index in self._running if self._unplanned[index] > 1]
        return [*started, *range(self._num_started, len(self._unplanned))]
