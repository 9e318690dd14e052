"""What a server says of its requests, and where."""

from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from headrace.errors import ConfigError


class LogFormat(Enum):
    TEXT = "text"
    JSON = "json"
    NONE = "none"


@dataclass(frozen=True, kw_only=True)
class ObservabilityConfig:
    """
    log_format: of the access log, one line for each request. log_file: where it is appended to; None is stderr.
    otlp_traces_endpoint: URL that traces are sent to, such as http://localhost:4318/v1/traces; None makes no traces.
    """

    log_format: LogFormat = LogFormat.TEXT
    log_file: Path | None = None
    otlp_traces_endpoint: str | None = None

    def __post_init__(self) -> None:
        endpoint = self.otlp_traces_endpoint
        if endpoint is not None and not endpoint.startswith(("http://", "https://")):
            raise ConfigError(
                f"the endpoint for traces is '{endpoint}'; give a URL such as http://localhost:4318/v1/traces"
            )
        if self.log_file is not None and self.log_format is LogFormat.NONE:
            raise ConfigError("a file for the access log and log format 'none' contradict each other; leave one out")
