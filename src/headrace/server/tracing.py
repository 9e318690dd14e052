"""One trace span for each HTTP request, with those of queue, prefill and decode below it, sent by OTLP.

Needs OpenTelemetry, an optional dependency. Attributes are those of its conventions for HTTP and for generative AI, or,
where these have none, vLLM's.
"""

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from headrace import __version__
from headrace.engine.metrics import RequestMetrics
from headrace.errors import ConfigError
from headrace.server.request_record import RequestRecord

if TYPE_CHECKING:
    from opentelemetry.sdk.trace.export import SpanExporter
    from opentelemetry.trace import Span

_TIMEOUT_S = 3.0
"""For a batch to be sent in, tries included: what a collector that is gone may delay the server's end by."""

_OPERATIONS = {
    "/v1/chat/completions": "chat",
    "/v1/completions": "text_completion",
    "/v1/responses": "chat",
    "/v1/embeddings": "embeddings",
}


class Tracer:
    """Makes the spans of a request once it has ended, so that nothing is done while it runs. A request for which
    nothing ran in the engine, such as one for metrics, has no trace.

    A client's own trace (W3C traceparent) goes on in them.
    """

    def __init__(self, exporter: "SpanExporter", model_name: str) -> None:
        # Optional, and slow to import.
        from opentelemetry import trace
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        resource = Resource.create({"service.name": "headrace", "service.version": __version__})
        self._provider = TracerProvider(resource=resource)
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("headrace", __version__)
        self._propagator = TraceContextTextMapPropagator()
        self._trace, self._model_name = trace, model_name

    def trace(self, record: RequestRecord) -> None:
        """A request that has ended."""
        if not record.metrics:
            return
        span = self._tracer.start_span(
            f"{record.method} {record.route}",
            context=self._propagator.extract(_text_headers(record)),
            kind=self._trace.SpanKind.SERVER,
            attributes=dict(self._attributes(record)),
            start_time=record.started_ns,
        )
        if record.status >= 500:
            span.set_status(self._trace.StatusCode.ERROR)
        parent = self._trace.set_span_in_context(span)
        for metrics in record.metrics:
            for name, start_s, end_s in _stages(metrics):
                stage: Span = self._tracer.start_span(name, context=parent, start_time=_epoch_ns(record, start_s))
                stage.end(_epoch_ns(record, end_s))
        span.end(_epoch_ns(record, record.end_s))

    def close(self) -> None:
        """Send what has not been sent yet."""
        self._provider.shutdown()

    def _attributes(self, record: RequestRecord) -> Iterator[tuple[str, Any]]:
        yield "http.request.method", record.method
        yield "http.route", record.route
        yield "url.path", record.path
        yield "http.response.status_code", record.status
        yield "gen_ai.operation.name", _OPERATIONS.get(record.route, "generate_content")
        yield "gen_ai.provider.name", "headrace"
        yield "gen_ai.request.model", self._model_name
        yield "gen_ai.response.model", self._model_name
        yield "gen_ai.request.id", record.request_id
        yield "gen_ai.request.n", len(record.finish_reasons)
        yield "gen_ai.response.finish_reasons", record.finish_reasons
        yield "gen_ai.usage.input_tokens", record.num_prompt_tokens
        yield "gen_ai.usage.output_tokens", record.num_completion_tokens
        yield "gen_ai.latency.e2e", record.duration_s
        if record.queue_s is not None:
            yield "gen_ai.latency.time_in_queue", record.queue_s
        if record.ttft_s is not None:
            yield "gen_ai.latency.time_to_first_token", record.ttft_s
        yield "headrace.client_left", record.is_disconnected


def make_tracer(endpoint: str, model_name: str) -> Tracer:
    """
    Raises:
        ConfigError: the extra is not installed.
    """
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    except ImportError as error:
        raise ConfigError(
            f"traces need OpenTelemetry, which is not installed ({error}); run `pip install opentelemetry-sdk "
            "opentelemetry-exporter-otlp-proto-http`, or leave --otlp-traces-endpoint out"
        ) from None
    return Tracer(OTLPSpanExporter(endpoint=endpoint, timeout=_TIMEOUT_S), model_name)


def _stages(metrics: RequestMetrics) -> Iterator[tuple[str, float, float]]:
    """Name, start and end of what a prompt went through; what it did not come to is left out."""
    moments = (metrics.arrival_s, metrics.scheduled_s, metrics.first_token_s, metrics.finished_s)
    for name, start_s, end_s in zip(("queue", "prefill", "decode"), moments, moments[1:], strict=False):
        if start_s is None or metrics.finished_s is None:
            return
        yield name, start_s, metrics.finished_s if end_s is None else end_s


def _epoch_ns(record: RequestRecord, monotonic_s: float) -> int:
    return record.started_ns + round((monotonic_s - record.start_s) * 1e9)


def _text_headers(record: RequestRecord) -> Mapping[str, str]:
    return {name.decode("latin-1"): value.decode("latin-1") for name, value in record.headers}
