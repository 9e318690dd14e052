"""How often, and how soon, an engine that was lost is started again."""

from collections import deque

_FIRST_DELAY_S = 0.25
_MAX_DELAY_S = 30.0


class RestartPolicy:
    """At most max_restarts within window_s, each after twice the delay of the one before."""

    def __init__(self, max_restarts: int, window_s: float) -> None:
        self._max_restarts, self._window_s = max_restarts, window_s
        self._restarts_s: deque[float] = deque()
        self.num_restarts = 0

    def next_delay_s(self, now_s: float) -> float | None:
        """What to wait before the next start; None if there have been too many."""
        while self._restarts_s and now_s - self._restarts_s[0] > self._window_s:
            self._restarts_s.popleft()
        if len(self._restarts_s) >= self._max_restarts:
            return None
        delay_s = min(_FIRST_DELAY_S * 2 ** len(self._restarts_s), _MAX_DELAY_S)
        self._restarts_s.append(now_s)
        self.num_restarts += 1
        return float(delay_s)
