"""The bound on a step's prompt tokens, against machines whose step times are known."""

import math
import random
from statistics import median

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.config import SchedulerConfig
from headrace.config.engine import LONGEST_STEP_S
from headrace.engine.prompt_pace import MIN_PROMPT_TOKENS, PromptPace
from headrace.errors import ConfigError


def run(pace: PromptPace, step_s, num_steps: int) -> list[int]:
    """Steps of as many prompt tokens as allowed, of which each takes step_s of that number."""
    limits = []
    for _ in range(num_steps):
        limits.append(pace.limit)
        pace.record(limits[-1], step_s(limits[-1]))
    return limits


def test_the_start_is_careful() -> None:
    assert PromptPace(0.25, block_size=16).limit == MIN_PROMPT_TOKENS == 32


@pytest.mark.parametrize(("block_size", "least"), [(1, 32), (16, 32), (20, 40), (32, 32), (33, 33), (256, 256)])
def test_limits_are_whole_blocks(block_size: int, least: int) -> None:
    pace = PromptPace(0.25, block_size)
    assert pace.limit == least
    pace.record(1000, 1.0)
    assert pace.limit == max(250 // block_size * block_size, least)


def test_a_prompt_step_without_decodes_is_measured_too() -> None:
    """350 tokens/s: a full budget of 1024 takes 2.9 s, and the first step beside decodes is right."""
    pace = PromptPace(0.25, block_size=16)
    pace.record(1024, 1024 / 350)
    assert pace.limit == 80 == 87 // 16 * 16


def test_steps_of_few_prompt_tokens_say_nothing() -> None:
    """A prompt of 31 tokens beside 16 decodes takes hardly longer than these alone."""
    pace = PromptPace(0.25, block_size=16)
    pace.record(1000, 1.0)
    for _ in range(20):
        pace.record(31, 0.2)
        pace.record(0, 0.2)
    assert pace.limit == 240


def test_plans_in_flight_share_the_time() -> None:
    pace = PromptPace(0.5, block_size=1, max_in_flight=2)
    pace.record(1000, 1.0)
    assert pace.limit == 250


def test_two_odd_steps_in_five_do_not_matter() -> None:
    pace = PromptPace(0.25, block_size=1)
    for seconds in (1.0, 60.0, 1.0, 60.0, 1.0):
        pace.record(1000, seconds)
    assert pace.limit == 250
    pace.record(1000, 60.0)
    assert pace.limit < 250, "three do"


def test_a_machine_that_became_slower_is_believed_after_three_steps() -> None:
    pace = PromptPace(0.25, block_size=1)
    run(pace, lambda n: n / 1000, 10)
    assert run(pace, lambda n: n / 500, 4)[-1] == 125


def test_a_clock_that_stands_still_bounds_nothing() -> None:
    pace = PromptPace(LONGEST_STEP_S, block_size=16)
    pace.record(64, 0.0)
    assert pace.limit > 10**9


@settings(derandomize=True)  # where noise stops 41 steps is chance: the same one every time
@given(
    base_s=st.floats(0, 0.2),
    token_s=st.floats(1e-5, 1e-2),
    noise=st.floats(0, 0.2),
    seed=st.integers(0, 2**32),
    first=st.integers(1, 2000),
)
def test_steps_come_to_take_about_the_time_allowed(
    base_s: float, token_s: float, noise: float, seed: int, first: int
) -> None:
    """A step of n prompt tokens takes base + n token seconds, more or less, and now and then ten times as long.

    base: decodes, weights to read. Wherever the pace starts, it finds the n that takes the time allowed.
    """
    source, max_step_s, block_size = random.Random(seed), 0.25, 4
    pace = PromptPace(max_step_s, block_size)

    def step_s(num_tokens: int) -> float:
        hiccup = 10 if source.random() < 0.05 else 1
        return (base_s + num_tokens * token_s) * source.uniform(1 - noise, 1 + noise) * hiccup

    pace.record(first, step_s(first))
    # From the least there is it grows by a quarter in three steps, where the base is four fifths of the time.
    run(pace, step_s, 250)
    expected = max((max_step_s - base_s) / token_s, MIN_PROMPT_TOKENS)
    # Of the time allowed, what the base leaves is what a token's noise is measured against.
    tolerance = 3 * noise * max_step_s / (max_step_s - base_s) + 0.1
    assert median(run(pace, step_s, 41)) == pytest.approx(expected, rel=tolerance, abs=block_size + 1)


def test_a_step_that_decodes_alone_fill_gets_the_least() -> None:
    pace = PromptPace(0.25, block_size=16)
    pace.record(1024, 1.0)
    assert run(pace, lambda n: 0.4 + n / 1000, 30)[-1] == MIN_PROMPT_TOKENS


@pytest.mark.parametrize("value", [0, -1, math.nan, math.inf, LONGEST_STEP_S + 1, "1", True])
def test_times_that_are_none(value: object) -> None:
    with pytest.raises(ConfigError, match=r"max_step_s is .*; allowed: a number above 0, up to 3600, or None"):
        SchedulerConfig(max_step_s=value)  # type: ignore[arg-type]
