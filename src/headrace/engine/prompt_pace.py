"""How many prompt tokens a step may take while others wait for their next token."""

from collections import deque
from statistics import median_low

MIN_PROMPT_TOKENS = 32
"""A step has room for so many, however slow: below that, its time goes into reading weights and into decodes, and a
long prompt would hardly move on."""

_WINDOW_STEPS = 5


class PromptPace:
    """Bounds a step's prompt tokens so that it takes about a given time, by what recent steps took.

    limit = step_s / s, in whole blocks and at least MIN_PROMPT_TOKENS of them, with s the median of seconds per prompt
    token over the last steps that had at least that many. Decodes beside prompts and whatever else a step costs are
    part of s. So it depends on the number of tokens, but a step that meets the limit is measured in its turn: with a
    step of a + b n seconds, the only limit that stays is the n for which that is step_s, and the distance of s from
    there shrinks by a / step_s each time. The median keeps two odd steps in five from mattering.

    Until a step has been measured, the limit is the least there is.

    step_s: what a step may take. A sequence that decodes gets a token in one of max_in_flight plans, so with several
        in flight each may take only its share of `max_step_s`.
    Knows nothing about clocks and tensors.
    """

    def __init__(self, max_step_s: float, block_size: int, max_in_flight: int = 1) -> None:
        self._step_s = max_step_s / max_in_flight
        self._block_size = block_size
        self._min_tokens = -(-MIN_PROMPT_TOKENS // block_size) * block_size
        self._token_s: deque[float] = deque(maxlen=_WINDOW_STEPS)

    def record(self, num_prompt_tokens: int, seconds: float) -> None:
        """A step has taken so long. Steps of few prompt tokens tell nothing of what more of them would cost."""
        if num_prompt_tokens >= self._min_tokens:
            self._token_s.append(seconds / num_prompt_tokens)

    @property
    def limit(self) -> int:
        """Prompt tokens that the next step may take beside decodes."""
        if not self._token_s:
            return self._min_tokens
        token_s = median_low(self._token_s)
        # A step that has taken no time on a coarse clock bounds nothing; neither does one of a nanosecond.
        num_blocks = int(self._step_s / max(token_s, 1e-9)) // self._block_size
        return max(num_blocks * self._block_size, self._min_tokens)


def make_pace(max_step_s: float | None, block_size: int, max_in_flight: int) -> PromptPace | None:
    """None where a step may take as long as it takes."""
    return None if max_step_s is None else PromptPace(max_step_s, block_size, max_in_flight)
