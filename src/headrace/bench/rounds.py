"""One round of prefill and decode, timed step by step on the engine itself."""

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count

import numpy as np

from headrace.config import SamplingParams
from headrace.costs.memory import num_blocks_for
from headrace.engine.engine import Engine
from headrace.engine.outputs import RequestUpdate
from headrace.errors import ConfigError, RequestError


@dataclass(frozen=True, kw_only=True)
class RoundTimes:
    """num_prompt_tokens and num_decode_tokens are over all sequences of the round.

    exchange_s: of the time before it, what rank 0 spent in exchanges with other ranks, waiting included.
    """

    num_seqs: int
    num_prompt_tokens: int
    prefill_s: float
    num_decode_tokens: int
    decode_s: float
    prefill_exchange_s: float = 0.0
    decode_exchange_s: float = 0.0

    @property
    def step_s(self) -> float:
        """Seconds of a decode step, which makes one token for each sequence."""
        return self.decode_s * self.num_seqs / self.num_decode_tokens


class RoundRunner:
    """Drives an engine that nobody else uses.

    Every prompt is new random token ids, so that the prefix cache never has any of it; a round in which it does is an
    error. Requests decode greedily and ignore the end of sequence, and are aborted when a round is over.

    repeats_prompts: the same random prompts in every round instead, for who measures decoding alone: the prefix cache
        has all but the end of them, and a long context costs its prefill once.
    """

    def __init__(self, engine: Engine, seed: int = 0, *, repeats_prompts: bool = False) -> None:
        self._engine = engine
        self._seed = seed
        self._random = np.random.default_rng(seed)
        self._repeats_prompts = repeats_prompts
        self._ids = count()

    def run(self, num_seqs: int, context_len: int, num_steps: int) -> RoundTimes:
        """Prefill `num_seqs` prompts of `context_len` tokens, then decode all of them for `num_steps` steps.

        Raises:
            ConfigError: as `prefilled`.
            RequestError: as `prefilled`, or a sequence ended before the round did.
        """
        executor = self._engine.model.executor
        exchanges_s = [executor.exchange_s()]
        with self.prefilled(num_seqs, context_len, num_steps) as prefill_s:
            exchanges_s.append(executor.exchange_s())
            start = time.perf_counter()
            # A step of the engine is one micro-batch of those that stages have in flight.
            num_decode_tokens = sum(self._step() for _ in range(num_steps * executor.max_in_flight))
            decode_s = time.perf_counter() - start
            exchanges_s.append(executor.exchange_s())
        return RoundTimes(
            num_seqs=num_seqs,
            num_prompt_tokens=num_seqs * context_len,
            prefill_s=prefill_s,
            num_decode_tokens=num_decode_tokens,
            decode_s=decode_s,
            prefill_exchange_s=exchanges_s[1] - exchanges_s[0],
            decode_exchange_s=exchanges_s[2] - exchanges_s[1],
        )

    @contextmanager
    def prefilled(self, num_seqs: int, context_len: int, num_steps: int) -> Iterator[float]:
        """Sequences with `context_len` tokens of prompt each and room for `num_steps`, and the seconds prefill took.

        Prefill ends when every sequence has its first token.

        Raises:
            ConfigError: the cache cannot hold all sequences at once; some would wait or be preempted.
            RequestError: the cache had a prompt that was to be measured.
        """
        self._check_room(num_seqs, context_len + num_steps + 1)
        if self._repeats_prompts:
            self._random = np.random.default_rng(self._seed)
        request_ids = [self._add(context_len) for _ in range(num_seqs)]
        try:
            start = time.perf_counter()
            self._prefill(request_ids)
            yield time.perf_counter() - start
        finally:
            num_cached_tokens = self._abort(request_ids)
        if num_cached_tokens and not self._repeats_prompts:
            raise RequestError(f"{num_cached_tokens} prompt tokens came from the cache; prefill was not measured")

    def fastest_step_s(self, num_steps: int) -> float:
        """Of so many decode steps of the sequences that are prefilled.

        Raises:
            RequestError: one of them ended.
        """
        best = float("inf")
        for _ in range(num_steps):
            start = time.perf_counter()
            self._step()
            best = min(best, time.perf_counter() - start)
        return best

    def _check_room(self, num_seqs: int, num_tokens: int) -> None:
        plan = self._engine.model.plan
        num_needed = num_seqs * num_blocks_for(num_tokens, plan.cache.block_size)
        if num_needed > plan.num_blocks:
            raise ConfigError(
                f"{num_seqs} sequences of {num_tokens} tokens need {num_needed} KV cache blocks, and there are "
                f"{plan.num_blocks}; give more --kv-cache-bytes, or smaller --batch-sizes"
            )

    def _add(self, context_len: int) -> str:
        request_id = f"bench-{next(self._ids)}"
        token_ids = self._random.integers(0, self._engine.model.config.vocab_size, context_len).tolist()
        params = SamplingParams(temperature=0.0, max_tokens=None, ignore_eos=True)
        self._engine.add_request(request_id, token_ids, params)
        return request_id

    def _prefill(self, request_ids: Iterable[str]) -> None:
        waiting = set(request_ids)
        while waiting:
            waiting -= {update.request_id for update in self._engine.step() if _num_tokens(update)}

    def _step(self) -> int:
        return sum(map(_num_tokens, self._engine.step()))

    def _abort(self, request_ids: Iterable[str]) -> int:
        """End the round; how many prompt tokens the cache had."""
        updates = [self._engine.abort(request_id) for request_id in request_ids]
        return sum(update.finished.metrics.num_cached_tokens for update in updates if update and update.finished)


def _num_tokens(update: RequestUpdate) -> int:
    """Tokens a step brought to a request.

    Raises:
        RequestError: it has ended, though it was to go on for the whole round.
    """
    for chunk in update.chunks:
        if chunk.finish_reason is not None:
            raise RequestError(f"a benchmark sequence ended early ({chunk.finish_reason}); use a shorter context")
    return sum(len(chunk.token_ids) for chunk in update.chunks)
