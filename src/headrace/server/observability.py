"""What a server says of itself and its requests: metrics, access log, traces; put together in one place."""

from collections.abc import Callable
from typing import Annotated

from fastapi import Depends, Request

from headrace.config.observability import LogFormat, ObservabilityConfig
from headrace.server.access_log import AccessLog
from headrace.server.context import ServerContext
from headrace.server.metrics import ServerMetrics
from headrace.server.recorder import OnEnd, Recorder
from headrace.server.tracing import make_tracer


class Observability:
    """
    recorder: for `RecordedRequests`.

    Raises:
        ConfigError: a log that cannot be written, traces without the extra that makes them.
    """

    def __init__(self, context: ServerContext) -> None:
        config: ObservabilityConfig = context.config.observability
        self.metrics = ServerMetrics(context.engine, context.model_name)
        on_end: list[OnEnd] = [self.metrics.count]
        self._closes: list[Callable[[], None]] = []
        if config.log_format is not LogFormat.NONE:
            log = AccessLog(config.log_format, config.log_file, context.config.api_keys)
            on_end.append(log.write)
            self._closes.append(log.close)
        if config.otlp_traces_endpoint is not None:
            tracer = make_tracer(config.otlp_traces_endpoint, context.model_name)
            on_end.append(tracer.trace)
            self._closes.append(tracer.close)
        self.recorder = Recorder(on_end)
        context.engine.watchers.append(self.recorder.watch)

    def close(self) -> None:
        """Say what has not been said yet."""
        self.recorder.close()
        for close in self._closes:
            close()


def _observability(request: Request) -> Observability:
    found: Observability = request.app.state.observability
    return found


Observed = Annotated[Observability, Depends(_observability)]
