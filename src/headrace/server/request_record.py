"""What is known of one HTTP request once it has ended: what logs, metrics and traces are made of."""

import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from uuid import uuid4

from starlette.types import Scope

from headrace.engine.metrics import RequestMetrics
from headrace.engine.outputs import RequestOutput
from headrace.server.auth import API_KEY

_SANE_ID = re.compile(rb"[A-Za-z0-9._:-]{1,128}")

_ENGINE_ID = re.compile(r"[a-z]+[-_](.+)-\d+")
"""Of a prompt in the engine: a word for the kind of answer, the HTTP request's id, a number."""

NO_ROUTE = "none"


@dataclass(kw_only=True)
class RequestRecord:
    """
    start_s, end_s: of a monotonic clock; started_ns: since 1970.
    api_key: the index of the key that it came with; None without one.
    is_disconnected: the client left before it had its whole answer.
    metrics, finish_reasons: of what ran in the engine for it, one for each prompt, one for each output.
    """

    request_id: str
    method: str
    path: str
    client: str
    headers: Sequence[tuple[bytes, bytes]]
    start_s: float = field(default_factory=time.monotonic)
    started_ns: int = field(default_factory=time.time_ns)
    end_s: float = 0.0
    status: int = 0
    route: str = NO_ROUTE
    api_key: int | None = None
    is_disconnected: bool = False
    metrics: list[RequestMetrics] = field(default_factory=list)
    finish_reasons: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, scope: Scope, request_id: str) -> "RequestRecord":
        client = scope.get("client")
        return cls(
            request_id=request_id,
            method=scope["method"],
            path=scope["path"],
            client=f"{client[0]}:{client[1]}" if client else "",
            headers=scope["headers"],
        )

    def add(self, output: RequestOutput) -> None:
        """What ran for it and has ended."""
        self.metrics.append(output.metrics)
        self.finish_reasons += [completion.finish_reason or "" for completion in output.outputs]

    def end(self, scope: Scope) -> None:
        """With what others have put into its scope meanwhile."""
        self.end_s = time.monotonic()
        self.route = getattr(scope.get("route"), "path", NO_ROUTE)
        self.api_key = scope.get(API_KEY)

    @property
    def duration_s(self) -> float:
        return self.end_s - self.start_s

    @property
    def ttft_s(self) -> float | None:
        """To the first token of any of its prompts."""
        return min((m.ttft_s for m in self.metrics if m.ttft_s is not None), default=None)

    @property
    def queue_s(self) -> float | None:
        """Until the first of its prompts ran."""
        return min((m.queue_s for m in self.metrics if m.queue_s is not None), default=None)

    @property
    def num_prompt_tokens(self) -> int:
        return sum(m.num_prompt_tokens for m in self.metrics)

    @property
    def num_cached_tokens(self) -> int:
        return sum(m.num_cached_tokens for m in self.metrics)

    @property
    def num_completion_tokens(self) -> int:
        return sum(m.num_completion_tokens for m in self.metrics)


def given_id(headers: Sequence[tuple[bytes, bytes]]) -> str | None:
    """X-Request-Id, if it can stand in a log, a header and an answer's id; None if there is none such."""
    for name, value in headers:
        if name == b"x-request-id" and _SANE_ID.fullmatch(value):
            return value.decode()
    return None


def new_id() -> str:
    return uuid4().hex


def http_id(engine_id: str) -> str | None:
    """The HTTP request that a request of the engine runs for: chatcmpl-ID-0 runs for ID."""
    found = _ENGINE_ID.fullmatch(engine_id)
    return None if found is None else found[1]
