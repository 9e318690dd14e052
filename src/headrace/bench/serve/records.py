"""What happened to one request, as times and counts."""

from dataclasses import dataclass, field
from enum import Enum


class FailureKind(Enum):
    """How a request failed; the reason says more."""

    CONNECT = "connect"
    """No connection: refused, unreachable, TLS."""
    STATUS = "status"
    """An HTTP status other than 200."""
    DISCONNECT = "disconnect"
    """The connection ended before the answer did."""
    TIMEOUT = "timeout"
    MALFORMED = "malformed"
    """Not HTTP, no event stream, no JSON, or not what OpenAI's API answers."""
    STREAM_ERROR = "stream error"
    """An error object in place of a chunk."""


@dataclass(frozen=True)
class Failure:
    kind: FailureKind
    reason: str
    status: int | None = None


@dataclass(slots=True, kw_only=True, eq=False)
class RequestRecord:
    """Times are seconds of one monotonic clock.

    scheduled_s: when it was to be sent; started_s: when it was, before a connection was looked for; chunk_s: when each
    chunk with output was read; ended_s: when the answer had ended, or failed. prompt_tokens and output_tokens are the
    server's own counts, None if it has sent none. is_reconnected: a kept connection had gone, and another was made.
    """

    scheduled_s: float
    started_s: float
    asked_prompt_tokens: int | None
    asked_output_tokens: int
    chunk_s: list[float] = field(default_factory=list)
    ended_s: float | None = None
    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    output_tokens: int | None = None
    finish_reason: str | None = None
    failure: Failure | None = None
    is_reconnected: bool = False

    @property
    def is_completed(self) -> bool:
        return self.ended_s is not None and self.failure is None

    @property
    def num_output_tokens(self) -> int:
        """The server's count, or one for each chunk where it has sent none."""
        return len(self.chunk_s) if self.output_tokens is None else self.output_tokens

    @property
    def lateness_s(self) -> float:
        """How much later than its schedule the generator has sent it."""
        return self.started_s - self.scheduled_s

    @property
    def ttft_s(self) -> float | None:
        """From the start to the first chunk with output; to the end if an answer had no such chunk."""
        if self.chunk_s:
            return self.chunk_s[0] - self.started_s
        return self.e2e_s

    @property
    def e2e_s(self) -> float | None:
        return None if self.ended_s is None else self.ended_s - self.started_s

    @property
    def tpot_s(self) -> float | None:
        """(last chunk - first chunk) / (output tokens - 1); None with fewer than two tokens."""
        if len(self.chunk_s) < 2 or self.num_output_tokens < 2:
            return None
        return (self.chunk_s[-1] - self.chunk_s[0]) / (self.num_output_tokens - 1)

    @property
    def itl_s(self) -> list[float]:
        """Intervals between chunks; a chunk may bring several tokens."""
        return [later - earlier for earlier, later in zip(self.chunk_s, self.chunk_s[1:], strict=False)]
