"""How much may wait, and be held: requests beyond a limit are refused at once, with a hint when to come again."""

import math
from collections import deque

from headrace.config.server import ServerConfig
from headrace.server.errors import InvalidParameter, Overloaded, Unavailable

_MAX_RETRY_AFTER_S = 60
_NUM_REMEMBERED = 64
_BODIES_RETRY_AFTER_S = 1


class Admission:
    """Counts what was accepted and has no output token yet: outputs, and prompt tokens. And what all requests that were
    not answered yet hold: their bodies, and the log probabilities that they may come to have.

    config: has the limits. An empty queue takes any request, however long, that the engine can hold.
    """

    def __init__(self, config: ServerConfig) -> None:
        self._config = config
        self.num_requests = self.num_tokens = 0
        self.logprob_bytes = self.body_bytes = 0
        self._starts_s: deque[float] = deque(maxlen=_NUM_REMEMBERED)
        reasons = ("max_waiting_requests", "max_waiting_tokens", "max_logprob_bytes", "max_bodies_bytes")
        self.num_refused = dict.fromkeys((*reasons, "queue_timeout"), 0)
        """By the limit that they met."""

    def check(self, num_requests: int, num_tokens: int, now_s: float) -> None:
        """
        Raises:
            Overloaded: so many more would be too many.
        """
        limits = self._config
        if self.num_requests and self.num_requests + num_requests > limits.max_waiting_requests:
            self.num_refused["max_waiting_requests"] += 1
            raise Overloaded(
                f"{self.num_requests} requests wait, and at most {limits.max_waiting_requests} may; try again later",
                retry_after_s=self.retry_after_s(now_s),
            )
        if self.num_tokens and self.num_tokens + num_tokens > limits.max_waiting_tokens:
            self.num_refused["max_waiting_tokens"] += 1
            raise Overloaded(
                f"{self.num_tokens} prompt tokens wait, and at most {limits.max_waiting_tokens} may; try again later",
                retry_after_s=self.retry_after_s(now_s),
            )

    def hold_logprobs(self, num_bytes: int, now_s: float) -> None:
        """Until `release_logprobs`.

        Raises:
            InvalidParameter: they are more than all requests together may hold.
            Overloaded: they are too many beside those of others.
        """
        most_bytes = self._config.max_logprob_bytes
        if num_bytes > most_bytes:
            raise InvalidParameter(
                "logprobs",
                f"the log probabilities asked for may take {_mib(num_bytes)}, and at most {_mib(most_bytes)} may be "
                "taken; ask for fewer tokens (max_tokens), fewer outputs (n) or fewer log probabilities of each",
            )
        if self.logprob_bytes + num_bytes > most_bytes:
            self.num_refused["max_logprob_bytes"] += 1
            raise Overloaded(
                f"log probabilities of open requests may take {_mib(self.logprob_bytes)}, those asked for "
                f"{_mib(num_bytes)}, and all at most {_mib(most_bytes)}; try again later",
                retry_after_s=self.retry_after_s(now_s),
            )
        self.logprob_bytes += num_bytes

    def release_logprobs(self, num_bytes: int) -> None:
        self.logprob_bytes -= num_bytes

    def hold_body(self, num_bytes: int) -> None:
        """Until `release_body`.

        Raises:
            Unavailable: so much more of bodies would be too much.
        """
        if self.body_bytes + num_bytes > self._config.max_bodies_bytes:
            self.num_refused["max_bodies_bytes"] += 1
            raise Unavailable(
                f"bodies of open requests have {_mib(self.body_bytes)}, and at most "
                f"{_mib(self._config.max_bodies_bytes)} may be; try again later",
                retry_after_s=_BODIES_RETRY_AFTER_S,
            )
        self.body_bytes += num_bytes

    def release_body(self, num_bytes: int) -> None:
        self.body_bytes -= num_bytes

    def enter(self, num_requests: int, num_tokens: int) -> None:
        self.num_requests += num_requests
        self.num_tokens += num_tokens

    def leave(self, num_requests: int, num_tokens: int, *, started_s: float | None = None) -> None:
        """So many wait no longer; started_s: when they had their first token, if they had one."""
        self.num_requests -= num_requests
        self.num_tokens -= num_tokens
        if started_s is not None:
            self._starts_s.append(started_s)

    def retry_after_s(self, now_s: float) -> int:
        """Whole seconds in which half of those who wait will have started, as fast as others did lately."""
        if len(self._starts_s) < 2:
            return 1
        per_s = len(self._starts_s) / max(now_s - self._starts_s[0], 1e-3)
        return max(1, min(_MAX_RETRY_AFTER_S, math.ceil(self.num_requests / 2 / per_s)))


def _mib(num_bytes: int) -> str:
    return f"{math.ceil(num_bytes / 2**20)} MiB"
