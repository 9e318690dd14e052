"""What a server allows: limits are on by default."""

import re
from dataclasses import dataclass, field

from headrace.config.observability import ObservabilityConfig
from headrace.errors import ConfigError

LOCALHOST = "127.0.0.1"
MAX_PORT = 65535
MAX_S = 1e6
"""Of any time limit, some eleven days: timers of the system count milliseconds in 31 bits, and know no infinity."""
_COUNTS = ("max_waiting_requests", "max_waiting_tokens", "max_logprob_bytes", "max_body_bytes", "max_connections")
TOOL_FORMATS = ("auto", "hermes", "llama3", "qwen")


@dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """Where the server listens, who may ask, how much waits, and how long anything may take.

    host, port: port 0 takes a free one.
    api_keys: one of them must come as `Authorization: Bearer KEY`; without any everybody may ask.
    cors_origins: web pages of other origins that may ask; "*" is every one.
    served_model_name: what clients call the model; None takes the folder's name or the hub id.
    max_waiting_requests, max_waiting_tokens: outputs and prompt tokens accepted that have no output token yet, beyond
        which requests are refused (429). A request that could never fit is refused alone (400).
    max_logprob_bytes: that the log probabilities of all open requests may take: one that alone may take more is refused
        for good (400), others until there is room (429).
    max_body_bytes: of one request. max_bodies_bytes: of all open ones together, beyond which they are refused (503).
    max_connections: open at a time; more are refused (503).
    queue_timeout_s: a request that has no first token by then is refused (503); request_timeout_s: ended by then.
    body_timeout_s: for a request's body to arrive. slow_reader_s: for a client to take in what was sent to it.
    drain_s: for running requests to end in after SIGTERM.
    max_restarts: of ranks that were lost, within restart_window_s; then the server ends.
    tool_format: how the model writes tool calls, one of TOOL_FORMATS; auto asks its chat template.
    observability: what is said of requests, and where.
    """

    host: str = LOCALHOST
    port: int = 8000
    api_keys: tuple[str, ...] = ()
    cors_origins: tuple[str, ...] = ()
    served_model_name: str | None = None
    max_waiting_requests: int = 256
    max_waiting_tokens: int = 262_144
    max_logprob_bytes: int = 2**30
    max_body_bytes: int = 8 * 2**20
    max_bodies_bytes: int = 256 * 2**20
    max_connections: int = 2048
    queue_timeout_s: float = 300.0
    request_timeout_s: float = 3600.0
    body_timeout_s: float = 30.0
    slow_reader_s: float = 60.0
    drain_s: float = 30.0
    max_restarts: int = 5
    restart_window_s: float = 600.0
    page: bool = True
    tool_format: str = "auto"
    observability: ObservabilityConfig = field(default_factory=ObservabilityConfig)

    def __post_init__(self) -> None:
        if not 0 <= self.port <= MAX_PORT:
            raise ConfigError(f"port is {self.port}; allowed: 1 to {MAX_PORT}, or 0 for a free one")
        for name in _COUNTS:
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; allowed: 1 and more")
        if self.max_body_bytes > self.max_bodies_bytes:
            raise ConfigError(
                f"max_body_bytes is {self.max_body_bytes}, but all bodies together may have {self.max_bodies_bytes} "
                "(max_bodies_bytes); allow a body less, or all of them more"
            )
        for name in ("queue_timeout_s", "request_timeout_s", "body_timeout_s", "slow_reader_s", "restart_window_s"):
            if not 0 < getattr(self, name) <= MAX_S:
                raise ConfigError(f"{name} is {getattr(self, name)}; allowed: above 0 seconds, up to {MAX_S:.0f}")
        if not 0 <= self.drain_s <= MAX_S:
            raise ConfigError(f"drain_s is {self.drain_s}; allowed: 0 to {MAX_S:.0f} seconds")
        if self.max_restarts < 0:
            raise ConfigError(f"max_restarts is {self.max_restarts}; allowed: 0 and more")
        if self.tool_format not in TOOL_FORMATS:
            raise ConfigError(f"tool_format is '{self.tool_format}'; allowed: {', '.join(TOOL_FORMATS)}")
        if not all(key.isascii() and key.isprintable() and key.strip() == key and key for key in self.api_keys):
            raise ConfigError("an API key is empty or has characters that no header carries; use printable ASCII")

        for origin in self.cors_origins:
            if origin != "*" and not re.fullmatch(r"[a-z][a-z0-9+.-]*://[^/\s]+", origin):
                raise ConfigError(f"the origin '{origin[:80]}' matches no page; write https://host, with :port, or '*'")

    @property
    def is_public(self) -> bool:
        """Whether other machines may reach it."""
        return self.host not in (LOCALHOST, "localhost", "::1")
