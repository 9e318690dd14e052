"""What an engine counts as it goes, for its metrics."""

from bisect import bisect_left
from collections import Counter

from headrace.cache.block_manager import BlockManager
from headrace.engine.metrics import STEP_TOKENS, EngineMetrics
from headrace.engine.outputs import RequestOutput
from headrace.engine.plan import StepPlan
from headrace.engine.scheduler import Scheduler
from headrace.engine.sequence import Sequence


class EngineCounters:
    """Since the engine was made; see `EngineMetrics` for what each one is.

    busy_s: in steps. num_generation_tokens: sampled, of requests that still wanted them. num_preemptions: by schedulers
    that the engine has given up.
    """

    def __init__(self, started_s: float) -> None:
        self._started_s = started_s
        self.busy_s = 0.0
        self.num_generation_tokens = self.num_preemptions = 0
        self._num_steps_by_tokens = [0] * (len(STEP_TOKENS) + 1)
        self._num_prompt_tokens = self._num_prefill_tokens = self._num_decode_tokens = 0
        self._prefix_query_tokens = self._prefix_hit_tokens = 0
        self._num_finished = 0
        self._finish_reasons: Counter[str] = Counter()

    def count_step(self, plan: StepPlan) -> None:
        num_tokens, num_decode_tokens = plan.num_tokens, plan.num_decode_tokens
        if num_tokens:
            self._num_steps_by_tokens[bisect_left(STEP_TOKENS, num_tokens)] += 1
        self._num_decode_tokens += num_decode_tokens
        self._num_prefill_tokens += num_tokens - num_decode_tokens

    def count_scheduled(self, sequence: Sequence, *, is_first: bool, searches_cache: bool) -> None:
        """A sequence that runs for the first time. is_first: of its request; searches_cache: for blocks of its
        prompt, as it would be."""
        if is_first:
            self._num_prompt_tokens += sequence.num_prompt_tokens
        if searches_cache and not sequence.needs_whole_prompt:
            self._prefix_query_tokens += sequence.num_prompt_tokens
        self._prefix_hit_tokens += sequence.num_cached_tokens

    def count_finished(self, request: RequestOutput) -> None:
        self._num_finished += 1
        self._finish_reasons.update(output.finish_reason or "" for output in request.outputs)

    def metrics(self, now_s: float, scheduler: Scheduler, blocks: BlockManager) -> EngineMetrics:
        """With what the scheduler and the block manager have now."""
        return EngineMetrics(
            uptime_s=now_s - self._started_s,
            busy_s=self.busy_s,
            num_running=scheduler.num_running,
            num_waiting=scheduler.num_waiting,
            num_steps=sum(self._num_steps_by_tokens),
            num_steps_by_tokens=tuple(self._num_steps_by_tokens),
            num_prompt_tokens=self._num_prompt_tokens,
            num_generation_tokens=self.num_generation_tokens,
            num_prefill_tokens=self._num_prefill_tokens,
            num_decode_tokens=self._num_decode_tokens,
            num_preemptions=self.num_preemptions + scheduler.num_preemptions,
            num_finished_requests=self._num_finished,
            num_finished_outputs=dict(self._finish_reasons),
            prefix_query_tokens=self._prefix_query_tokens,
            prefix_hit_tokens=self._prefix_hit_tokens,
            num_blocks=blocks.num_blocks,
            num_used_blocks=blocks.num_blocks - blocks.num_free_blocks,
        )
