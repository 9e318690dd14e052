"""What a request and an engine took: counters and times, with TTFT and TPOT defined here and nowhere else."""

from dataclasses import dataclass


@dataclass(kw_only=True)
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
    """A snapshot. Counters are since the engine started; `kv_cache_usage` is the share of blocks in use, 0 to 1."""

    num_running: int
    num_waiting: int
    num_steps: int
    num_prefill_tokens: int
    num_decode_tokens: int
    num_preemptions: int
    num_finished_requests: int
    prefix_query_tokens: int
    prefix_hit_tokens: int
    num_blocks: int
    kv_cache_usage: float

    @property
    def prefix_hit_rate(self) -> float:
        """Prompt tokens found in the cache over prompt tokens looked up."""
        return self.prefix_hit_tokens / self.prefix_query_tokens if self.prefix_query_tokens else 0.0
