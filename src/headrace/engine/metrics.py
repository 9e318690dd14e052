"""What a request and an engine took: counters and times, with TTFT and TPOT defined here and nowhere else."""

from collections.abc import Mapping
from dataclasses import dataclass

from headrace.config import CacheConfig
from headrace.engine.rank_statistics import ExchangeTotals

STEP_TOKENS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
"""By which steps are sorted, as vLLM sorts them."""


@dataclass(kw_only=True, slots=True)
class RequestMetrics:
    """Times are seconds of one monotonic clock.

    arrival_s: the request entered the engine; scheduled_s: it first ran; finished_s: it had its last token.
    num_cached_tokens: prompt tokens found in the cache; completion counts are over all n outputs.
    """

    arrival_s: float
    scheduled_s: float | None = None
    first_token_s: float | None = None
    finished_s: float | None = None
    num_prompt_tokens: int = 0
    num_completion_tokens: int = 0
    num_cached_tokens: int = 0
    num_preemptions: int = 0
    num_outputs: int = 1

    @property
    def queue_s(self) -> float | None:
        """From arrival to the first step that ran the request."""
        return None if self.scheduled_s is None else self.scheduled_s - self.arrival_s

    @property
    def ttft_s(self) -> float | None:
        """Time to first token: from arrival to the first output token, waiting in the queue included."""
        return None if self.first_token_s is None else self.first_token_s - self.arrival_s

    @property
    def tpot_s(self) -> float | None:
        """Time per output token after the first: (finished - first token) / (tokens - 1), per output.

        None with fewer than two tokens: one token has no interval.
        """
        intervals = self.num_completion_tokens / self.num_outputs - 1
        if self.first_token_s is None or self.finished_s is None or intervals <= 0:
            return None
        return (self.finished_s - self.first_token_s) / intervals

    @property
    def tokens_per_s(self) -> float | None:
        """Output tokens over the time from arrival to finish."""
        if self.finished_s is None or self.finished_s <= self.arrival_s:
            return None
        return self.num_completion_tokens / (self.finished_s - self.arrival_s)


@dataclass(frozen=True, kw_only=True)
class EngineMetrics:
    """A snapshot. Counters are since the engine started.

    busy_s: within steps; the rest of uptime_s passed without one.
    num_prefill_tokens, num_decode_tokens: computed, those of a second time after a preemption included.
    num_prompt_tokens: of requests that have begun to run, those found in the cache included, and for n outputs once;
        num_generation_tokens: sampled.
    num_steps_by_tokens: one more than STEP_TOKENS: steps of at most so many tokens and of more than the one before; the
        last one is of steps that have more than any.
    num_finished_outputs: by finish reason, n for a request of n outputs.
    """

    uptime_s: float
    busy_s: float
    num_running: int
    num_waiting: int
    num_steps: int
    num_steps_by_tokens: tuple[int, ...]
    num_prompt_tokens: int
    num_generation_tokens: int
    num_prefill_tokens: int
    num_decode_tokens: int
    num_preemptions: int
    num_finished_requests: int
    num_finished_outputs: Mapping[str, int]
    prefix_query_tokens: int
    prefix_hit_tokens: int
    num_blocks: int
    num_used_blocks: int

    @property
    def kv_cache_usage(self) -> float:
        """The share of blocks that sequences hold, 0 to 1."""
        return self.num_used_blocks / self.num_blocks

    @property
    def prefix_hit_rate(self) -> float:
        """Prompt tokens found in the cache over prompt tokens looked up."""
        return self.prefix_hit_tokens / self.prefix_query_tokens if self.prefix_query_tokens else 0.0


@dataclass(frozen=True, kw_only=True)
class EngineStatistics:
    """A snapshot of what all ranks have counted.

    cache: its settings.
    exchange_s: of metrics.busy_s, what rank 0 spent in exchanges with other ranks, waiting for them included.
    exchanges, num_softmax_rows, num_recomputed_rows: of all ranks since they were loaded, see `RankStatistics`.
    """

    metrics: EngineMetrics
    cache: CacheConfig
    exchange_s: float
    exchanges: tuple[ExchangeTotals, ...]
    num_softmax_rows: int
    num_recomputed_rows: int

    @property
    def compute_s(self) -> float:
        """Time in steps that rank 0 was in no exchange; with several stages, until the last one's answer had come."""
        return max(0.0, self.metrics.busy_s - self.exchange_s)

    @property
    def waiting_s(self) -> float:
        """Time without a step."""
        return self.metrics.uptime_s - self.metrics.busy_s
