"""Latencies and sizes of requests as histograms, fed by the engine's updates."""

from collections import deque
from collections.abc import Iterable, Sequence

from prometheus_client import CollectorRegistry, Counter, Histogram

from headrace.engine.metrics import RequestMetrics
from headrace.engine.outputs import RequestOutput, RequestUpdate

NUM_RECENT = 128

TOKEN_SECONDS = (
    *(0.0005, 0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.04, 0.05, 0.075),
    *(0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 10.0),
)
"""From a small model on a GPU to a large one on a laptop."""

FIRST_TOKEN_SECONDS = (
    *(0.001, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0),
)
REQUEST_SECONDS = (
    *(0.001, 0.005, 0.01, 0.05, 0.1, 0.2, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0),
    *(20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0),
)
NUM_TOKENS = tuple(digit * 10**power for power in range(6) for digit in (1, 2, 5))


class Latencies:
    """Observes tokens as they come, and requests when they have ended.

    Names are vLLM's, so that dashboards made for it show this server too. A request that was aborted or failed has no
    latency as a whole; its tokens have.

    recent: what the last NUM_RECENT requests took, oldest first.
    """

    def __init__(self, registry: CollectorRegistry, model_name: str) -> None:
        def histogram(name: str, text: str, buckets: Sequence[float]) -> Histogram:
            made = Histogram(f"vllm:{name}", text, ["model_name"], registry=registry, buckets=buckets)
            return made.labels(model_name)

        self.recent: deque[RequestMetrics] = deque(maxlen=NUM_RECENT)
        self._ttft = histogram(
            "time_to_first_token_seconds",
            "Seconds from a request's arrival to its first token, the queue included.",
            FIRST_TOKEN_SECONDS,
        )
        self._itl = histogram(
            "inter_token_latency_seconds", "Seconds from one token of an output to the next.", TOKEN_SECONDS
        )
        self._tpot = histogram(
            "request_time_per_output_token_seconds",
            "Mean seconds per token after the first, one value for each request.",
            TOKEN_SECONDS,
        )
        self._e2e = histogram(
            "e2e_request_latency_seconds", "Seconds from a request's arrival to its last token.", REQUEST_SECONDS
        )
        self._queue = histogram(
            "request_queue_time_seconds", "Seconds from a request's arrival until it first ran.", REQUEST_SECONDS
        )
        self._inference = histogram(
            "request_inference_time_seconds", "Seconds from a request's first run to its last token.", REQUEST_SECONDS
        )
        self._prefill = histogram(
            "request_prefill_time_seconds", "Seconds from a request's first run to its first token.", REQUEST_SECONDS
        )
        self._decode = histogram(
            "request_decode_time_seconds", "Seconds from a request's first token to its last.", REQUEST_SECONDS
        )
        self._prompt = histogram("request_prompt_tokens", "Prompt tokens of a request.", NUM_TOKENS)
        self._generation = histogram(
            "request_generation_tokens", "Tokens generated for a request, all its outputs together.", NUM_TOKENS
        )
        self._finished = Counter(
            "vllm:request_success",
            "Outputs that have ended, by the reason: stop, length, abort or error.",
            ["model_name", "finished_reason"],
            registry=registry,
        )
        self._model_name = model_name
        for reason in ("stop", "length", "abort", "error"):
            self._finished.labels(model_name, reason)

    def watch(self, updates: Iterable[RequestUpdate]) -> None:
        """What a step of the engine has brought; see `AsyncEngine.watchers`."""
        for update in updates:
            for chunk in update.chunks:
                if chunk.itl_s is not None:
                    self._itl.observe(chunk.itl_s)
                if chunk.ttft_s is not None:
                    self._ttft.observe(chunk.ttft_s)
            if update.finished is not None:
                self._observe_end(update.finished)

    def _observe_end(self, output: RequestOutput) -> None:
        reasons = [completion.finish_reason or "" for completion in output.outputs]
        for reason in reasons:
            self._finished.labels(self._model_name, reason).inc()
        if not {"abort", "error"} & set(reasons):
            self.recent.append(output.metrics)
            self._observe_request(output.metrics)

    def _observe_request(self, metrics: RequestMetrics) -> None:
        self._prompt.observe(metrics.num_prompt_tokens)
        self._generation.observe(metrics.num_completion_tokens)
        _observe(self._tpot, metrics.tpot_s)
        _observe(self._queue, metrics.queue_s)
        _observe_span(self._e2e, metrics.arrival_s, metrics.finished_s)
        _observe_span(self._inference, metrics.scheduled_s, metrics.finished_s)
        _observe_span(self._prefill, metrics.scheduled_s, metrics.first_token_s)
        _observe_span(self._decode, metrics.first_token_s, metrics.finished_s)


def _observe(histogram: Histogram, seconds: float | None) -> None:
    if seconds is not None:
        histogram.observe(seconds)


def _observe_span(histogram: Histogram, start_s: float | None, end_s: float | None) -> None:
    if start_s is not None and end_s is not None:
        histogram.observe(end_s - start_s)
