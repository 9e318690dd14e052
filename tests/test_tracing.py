"""Trace spans: what they say of a request, on whose trace they are, and what goes over the wire."""

import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import openai
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from headrace.config.observability import LogFormat, ObservabilityConfig
from headrace.engine.metrics import RequestMetrics
from headrace.errors import ConfigError
from headrace.server.request_record import RequestRecord
from headrace.server.tracing import Tracer, make_tracer
from tests.serving import running_server

STARTED_NS = 1_700_000_000_000_000_000
TRACEPARENT = (b"traceparent", b"00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01")


def spans_of(record: RequestRecord) -> dict:
    exporter = InMemorySpanExporter()
    tracer = Tracer(exporter, "demo")
    tracer.trace(record)
    tracer.close()
    return {span.name: span for span in exporter.get_finished_spans()}


def record(metrics: list[RequestMetrics], **fields) -> RequestRecord:
    known = {
        "request_id": "an-id",
        "method": "POST",
        "path": "/v1/chat/completions",
        "route": "/v1/chat/completions",
        "client": "127.0.0.1:9",
        "headers": [TRACEPARENT, (b"authorization", b"Bearer sk-secret")],
        "status": 200,
        "start_s": 100.0,
        "end_s": 104.5,
        "started_ns": STARTED_NS,
        "finish_reasons": ["stop"],
    }
    return RequestRecord(**{**known, "metrics": metrics, **fields})


WHOLE = RequestMetrics(
    arrival_s=100.5,
    scheduled_s=101.0,
    first_token_s=102.0,
    finished_s=104.0,
    num_prompt_tokens=12,
    num_completion_tokens=30,
)


def seconds(span) -> tuple[float, float]:
    """Since the request began."""
    return (span.start_time - STARTED_NS) / 1e9, (span.end_time - STARTED_NS) / 1e9


def test_a_request_is_a_span_with_its_stages_below_it():
    spans = spans_of(record([WHOLE]))
    request = spans["POST /v1/chat/completions"]
    assert {name: seconds(span) for name, span in spans.items()} == {
        "POST /v1/chat/completions": (0.0, 4.5),
        "queue": (0.5, 1.0),
        "prefill": (1.0, 2.0),
        "decode": (2.0, 4.0),
    }
    assert all(spans[name].parent.span_id == request.context.span_id for name in ("queue", "prefill", "decode"))
    attributes = request.attributes
    assert attributes["gen_ai.usage.input_tokens"] == 12
    assert attributes["gen_ai.usage.output_tokens"] == 30
    assert attributes["gen_ai.latency.time_to_first_token"] == 1.5
    assert attributes["gen_ai.response.finish_reasons"] == ("stop",)
    assert attributes["http.response.status_code"] == 200
    assert "sk-secret" not in request.to_json()
    assert request.resource.attributes["service.name"] == "headrace"


def test_a_client_s_trace_goes_on():
    request = spans_of(record([WHOLE]))["POST /v1/chat/completions"]
    assert f"{request.context.trace_id:032x}" == "0af7651916cd43dd8448eb211c80319c"
    assert f"{request.parent.span_id:016x}" == "b7ad6b7169203331"
    assert spans_of(record([WHOLE], headers=[]))["POST /v1/chat/completions"].parent is None
    broken = [(b"traceparent", b"00-zz-\xff-01")]
    assert spans_of(record([WHOLE], headers=broken))["POST /v1/chat/completions"].parent is None


def test_a_request_has_the_stages_that_it_came_to():
    waited = RequestMetrics(arrival_s=100.5, finished_s=103.0)
    assert seconds(spans_of(record([waited]))["queue"]) == (0.5, 3.0)
    assert set(spans_of(record([waited]))) == {"POST /v1/chat/completions", "queue"}
    cut = RequestMetrics(arrival_s=100.5, scheduled_s=101.0, finished_s=103.0)
    assert set(spans_of(record([cut]))) == {"POST /v1/chat/completions", "queue", "prefill"}


def test_errors_and_requests_without_a_model():
    assert spans_of(record([WHOLE]))["POST /v1/chat/completions"].status.status_code.value != 2
    assert spans_of(record([WHOLE], status=503))["POST /v1/chat/completions"].status.status_code.value == 2
    assert spans_of(record([])) == {}


def test_without_the_extra_an_endpoint_is_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    with pytest.raises(ConfigError, match="pip install opentelemetry-sdk opentelemetry-exporter-otlp-proto-http"):
        make_tracer("http://localhost:4318/v1/traces", "demo")
    with pytest.raises(ConfigError, match="give a URL"):
        ObservabilityConfig(otlp_traces_endpoint="localhost:4318")


class Collector:
    """What an OTLP endpoint is sent."""

    def __init__(self) -> None:
        self.requests: list[tuple[str, ExportTraceServiceRequest]] = []
        requests = self.requests

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                requests.append((self.path, ExportTraceServiceRequest.FromString(body)))
                self.send_response(200)
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        self.server = HTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1/traces"
        self.thread = threading.Thread(target=self.server.serve_forever)

    def __enter__(self) -> "Collector":
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()


def test_a_server_sends_its_traces_before_it_ends():
    with Collector() as collector:
        config = ObservabilityConfig(log_format=LogFormat.NONE, otlp_traces_endpoint=collector.url)
        with (
            running_server(observability=config) as server,
            openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client,
        ):
            client.completions.create(
                model="demo", prompt=[[5], [6]], max_tokens=3, extra_headers={"X-Request-Id": "traced"}
            )
    [(path, sent)] = collector.requests
    assert path == "/v1/traces"
    spans = [span for resource in sent.resource_spans for scope in resource.scope_spans for span in scope.spans]
    names = sorted(span.name for span in spans)
    assert names == ["POST /v1/completions", *["decode"] * 2, *["prefill"] * 2, *["queue"] * 2]
    [request] = [span for span in spans if span.name.startswith("POST")]
    attributes = {attribute.key: attribute.value for attribute in request.attributes}
    assert attributes["gen_ai.request.id"].string_value == "traced"
    assert attributes["gen_ai.usage.input_tokens"].int_value == 2
    assert attributes["gen_ai.operation.name"].string_value == "text_completion"
