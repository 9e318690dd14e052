"""Everything that `/metrics` says, in one registry of its own."""

from collections.abc import Iterator, Sequence

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.openmetrics import exposition as openmetrics
from prometheus_client.registry import Collector

from headrace import __version__
from headrace.engine.metrics import EngineStatistics, RequestMetrics
from headrace.server.async_engine import AsyncEngine
from headrace.server.engine_collector import EngineCollector
from headrace.server.engine_watch import EngineWatch
from headrace.server.latencies import REQUEST_SECONDS, Latencies
from headrace.server.request_record import RequestRecord

_OPENMETRICS = "application/openmetrics-text"


class ServerMetrics:
    """Fed by the engine's updates (it watches them) and by requests that have ended (`count`)."""

    def __init__(self, engine: AsyncEngine, model_name: str) -> None:
        self.registry = CollectorRegistry(auto_describe=False)
        self._watch = EngineWatch(engine)
        self._latencies = Latencies(self.registry, model_name)
        engine.watchers.append(self._latencies.watch)
        self.registry.register(EngineCollector(self._watch, model_name))
        self.registry.register(_ServerCollector(engine, model_name))
        self._requests = Counter(
            "headrace:http_requests",
            "HTTP requests that have ended, by route and status; 499 is one whose client left.",
            ["method", "route", "status"],
            registry=self.registry,
        )
        self._seconds = Histogram(
            "headrace:http_request_duration_seconds",
            "Seconds from a request's head to the last byte of its answer.",
            ["route"],
            registry=self.registry,
            buckets=REQUEST_SECONDS,
        )

    def count(self, record: RequestRecord) -> None:
        """An HTTP request that has ended."""
        status = 499 if record.is_disconnected else record.status
        self._requests.labels(_known_method(record.method), record.route, str(status)).inc()
        self._seconds.labels(record.route).observe(record.duration_s)

    async def look(self) -> EngineStatistics | None:
        """What the engine says of itself, a second old at most unless it is busy; None before it was ready."""
        return await self._watch.look()

    @property
    def recent(self) -> Sequence[RequestMetrics]:
        """What the last requests took, oldest first."""
        return self._latencies.recent

    async def render(self, accept: str) -> tuple[bytes, str]:
        """The page in the format that a client accepts (Prometheus' text or OpenMetrics), and its type."""
        await self.look()
        if _OPENMETRICS in accept:
            # The library's own choice writes the colons of names as underscores, though they are allowed.
            body: bytes = openmetrics.generate_latest(self.registry, openmetrics.ALLOWUTF8)  # type: ignore[no-untyped-call]
            return body, openmetrics.CONTENT_TYPE_LATEST
        encode, content_type = choose_encoder("")
        return encode(self.registry), content_type


class _ServerCollector(Collector):
    """What the server itself counts, read where it is kept."""

    def __init__(self, engine: AsyncEngine, model_name: str) -> None:
        self._engine, self._model_name = engine, model_name

    def describe(self) -> list[Metric]:
        return []

    def collect(self) -> Iterator[Metric]:
        engine = self._engine
        yield GaugeMetricFamily(
            "headrace:up", "1 if requests can be answered, as /health says.", value=engine.trouble is None
        )
        yield GaugeMetricFamily("headrace:open_requests", "Prompts accepted that have not ended.", engine.num_open)
        yield GaugeMetricFamily(
            "headrace:queued_requests", "Outputs accepted that have no token yet.", engine.admission.num_requests
        )
        yield GaugeMetricFamily(
            "headrace:queued_tokens", "Prompt tokens of those that have no token yet.", engine.admission.num_tokens
        )
        yield GaugeMetricFamily(
            "headrace:logprob_bytes",
            "Bytes that log probabilities of open requests may come to take.",
            engine.admission.logprob_bytes,
        )
        yield GaugeMetricFamily(
            "headrace:body_bytes", "Bytes of the bodies of open requests.", engine.admission.body_bytes
        )
        refused = CounterMetricFamily(
            "headrace:refused_requests", "Requests refused because of others, by limit.", labels=("reason",)
        )
        for reason, number in engine.admission.num_refused.items():
            refused.add_metric((reason,), number)
        yield refused
        yield CounterMetricFamily("headrace:lost_requests", "Prompts that ended with their ranks.", engine.num_lost)
        yield CounterMetricFamily(
            "headrace:engine_restarts", "Times that lost ranks were started again.", engine.restarts.num_restarts
        )
        yield InfoMetricFamily(
            "headrace:server", "What runs here.", {"version": __version__, "model_name": self._model_name}
        )


def _known_method(method: str) -> str:
    """A client may call its method anything; a metric has few series."""
    return method if method in ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS") else "other"
