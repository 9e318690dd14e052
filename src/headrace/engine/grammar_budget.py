"""How much of a core's time the outputs of one request may take to be held to their form."""

from headrace.errors import RequestError

_MAX_S = 1.0
_MAX_S_PER_STEP = 0.009
_MAX_S_PER_TOKEN = 0.001
"""Beyond 100 times what following a schema costs, for one output; 40 times, for a thousand. What is within the other
limits at each token but near them at all of them ends here, instead of delaying everybody else."""


class TimeBudget:
    """Shared by all outputs of a request, so that a second does not come with each of them.

    allowed_s = 1 s + 9 ms * tokens of the longest output + 1 ms * tokens of all outputs
    """

    def __init__(self) -> None:
        self._spent_s = 0.0
        self._num_tokens = self._longest_tokens = 0

    def check(self) -> None:
        """
        Raises:
            RequestError: there is no time left, for whichever output.
        """
        if self._spent_s > _MAX_S + _MAX_S_PER_STEP * self._longest_tokens + _MAX_S_PER_TOKEN * self._num_tokens:
            raise RequestError(
                f"following it has taken {self._spent_s:.1f} s for {self._num_tokens} tokens of all outputs, too long"
            )

    def spend(self, seconds: float, output_tokens: int) -> None:
        """An output has taken so long for one more token; output_tokens: that it has with this one."""
        self._spent_s += seconds
        self._num_tokens += 1
        self._longest_tokens = max(self._longest_tokens, output_tokens)
