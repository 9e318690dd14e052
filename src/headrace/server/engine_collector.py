"""The engine's statistics as Prometheus metrics: vLLM's names where it has one, headrace's where it has none."""

from collections.abc import Iterator
from itertools import accumulate

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from headrace.engine.metrics import STEP_TOKENS, EngineMetrics, EngineStatistics
from headrace.server.engine_watch import EngineWatch

_COMMUNICATION = ("group", "operation", "phase", "source")


class EngineCollector(Collector):
    """Gives what the engine has said last, without asking it anew."""

    def __init__(self, watch: EngineWatch, model_name: str) -> None:
        self._watch, self._model_name = watch, model_name

    def describe(self) -> list[Metric]:
        """No name is promised: before the engine is ready there is nothing to give."""
        return []

    def collect(self) -> Iterator[Metric]:
        statistics = self._watch.latest
        if statistics is None:
            return
        yield self._cache(statistics)
        yield from self._gauges(statistics)
        yield from self._counters(statistics)
        yield self._step_tokens(statistics.metrics)
        yield self._times(statistics)
        yield from self._communication(statistics)

    def _cache(self, statistics: EngineStatistics) -> Metric:
        """vLLM counts the blocks of any device as a GPU's."""
        cache = statistics.cache
        facts = {
            "block_size": str(cache.block_size),
            "cache_dtype": cache.kv_cache_dtype.value,
            "enable_prefix_caching": str(cache.enable_prefix_caching),
            "num_gpu_blocks": str(statistics.metrics.num_blocks),
        }
        return InfoMetricFamily("vllm:cache_config", "The cache's settings.", {"model_name": self._model_name, **facts})

    def _gauges(self, statistics: EngineStatistics) -> Iterator[Metric]:
        metrics = statistics.metrics
        yield self._gauge("vllm:num_requests_running", "Outputs that have a place in the cache.", metrics.num_running)
        yield self._gauge("vllm:num_requests_waiting", "Outputs that wait for a place.", metrics.num_waiting)
        yield self._gauge(
            "vllm:kv_cache_usage_perc", "Share of the cache's blocks in use, 0 to 1.", metrics.kv_cache_usage
        )
        yield self._gauge("headrace:kv_cache_blocks", "Blocks of the cache.", metrics.num_blocks)
        yield self._gauge("headrace:kv_cache_used_blocks", "Blocks that outputs hold.", metrics.num_used_blocks)

    def _counters(self, statistics: EngineStatistics) -> Iterator[Metric]:
        metrics = statistics.metrics
        yield self._counter(
            "vllm:prompt_tokens", "Prompt tokens of requests that have begun to run.", metrics.num_prompt_tokens
        )
        yield self._counter("vllm:generation_tokens", "Tokens generated.", metrics.num_generation_tokens)
        yield self._counter(
            "vllm:prefix_cache_queries", "Prompt tokens looked up in the cache.", metrics.prefix_query_tokens
        )
        yield self._counter("vllm:prefix_cache_hits", "Prompt tokens found in the cache.", metrics.prefix_hit_tokens)
        yield self._counter(
            "vllm:num_preemptions", "Outputs that gave up their blocks and started over.", metrics.num_preemptions
        )
        yield self._counter("headrace:steps", "Steps of the engine.", metrics.num_steps)
        computed = self._family(
            "headrace:computed_tokens", "Tokens computed, those again after a preemption included.", ("phase",)
        )
        self._add(computed, ("prefill",), metrics.num_prefill_tokens)
        self._add(computed, ("decode",), metrics.num_decode_tokens)
        yield computed
        yield self._counter(
            "headrace:softmax_rows", "Rows of the asynchronized softmax, all ranks.", statistics.num_softmax_rows
        )
        yield self._counter(
            "headrace:softmax_recomputed_rows",
            "Rows of the asynchronized softmax that were out of range and computed again, all ranks.",
            statistics.num_recomputed_rows,
        )

    def _step_tokens(self, metrics: EngineMetrics) -> Metric:
        family = HistogramMetricFamily(
            "vllm:iteration_tokens_total", "Tokens computed in one step of the engine.", labels=("model_name",)
        )
        bounds = (*(str(float(bound)) for bound in STEP_TOKENS), "+Inf")
        buckets = list(zip(bounds, accumulate(metrics.num_steps_by_tokens), strict=True))
        family.add_metric((self._model_name,), buckets, metrics.num_prefill_tokens + metrics.num_decode_tokens)
        return family

    def _times(self, statistics: EngineStatistics) -> Metric:
        times = self._family(
            "headrace:time_seconds",
            "Where time went on rank 0: compute and communication within steps, waiting between them.",
            ("kind",),
        )
        self._add(times, ("compute",), statistics.compute_s)
        self._add(times, ("communication",), statistics.exchange_s)
        self._add(times, ("waiting",), statistics.waiting_s)
        return times

    def _communication(self, statistics: EngineStatistics) -> Iterator[Metric]:
        calls = self._family("headrace:communication_calls", "Exchanges between ranks, one per rank.", _COMMUNICATION)
        payload = self._family(
            "headrace:communication_payload_bytes", "Bytes of the tensors that ranks exchanged.", _COMMUNICATION
        )
        wire = self._family("headrace:communication_wire_bytes", "Bytes that ranks sent.", _COMMUNICATION)
        for exchange in statistics.exchanges:
            place = (exchange.group, exchange.operation, exchange.phase.value)
            for source, sums in (("counted", exchange.counted), ("predicted", exchange.predicted)):
                self._add(calls, (*place, source), sums.num_calls)
                self._add(payload, (*place, source), sums.payload_bytes)
                self._add(wire, (*place, source), sums.wire_bytes)
        yield from (calls, payload, wire)

    def _gauge(self, name: str, text: str, value: float) -> Metric:
        family = GaugeMetricFamily(name, text, labels=("model_name",))
        family.add_metric((self._model_name,), value)
        return family

    def _counter(self, name: str, text: str, value: float) -> Metric:
        family = self._family(name, text, ())
        self._add(family, (), value)
        return family

    def _family(self, name: str, text: str, labels: tuple[str, ...]) -> CounterMetricFamily:
        return CounterMetricFamily(name, text, labels=("model_name", *labels))

    def _add(self, family: CounterMetricFamily, labels: tuple[str, ...], value: float) -> None:
        family.add_metric((self._model_name, *labels), value, created=self._watch.started_at_s)
