"""The speed of a loaded model: prefill, decode from a context, batched decode.

Protocol: each figure is the best of several rounds. Prefill is P tokens of one sequence; decode is D steps from a
context of C tokens; batched decode of B sequences is 12 steps from a context of 8 tokens each.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

from headrace.bench.rounds import RoundRunner, RoundTimes
from headrace.engine.engine import Engine

BATCH_CONTEXT_LEN = 8
BATCH_STEPS = 12


@dataclass(frozen=True, kw_only=True)
class BenchSettings:
    prefill_tokens: tuple[int, ...] = (512,)
    decode_tokens: int = 48
    context_lens: tuple[int, ...] = (512,)
    batch_sizes: tuple[int, ...] = (1, 4, 8, 16)
    num_rounds: int = 3


@dataclass(frozen=True, kw_only=True)
class ModelSpeed:
    """Seconds, best of the rounds: prefill_s by prompt length, decode_step_s by context length, batch_step_s by batch
    size. A step makes one token for each sequence.

    The exchange shares say what part of that time rank 0 spent in exchanges with other ranks, waiting included."""

    prefill_s: dict[int, float] = field(default_factory=dict)
    decode_step_s: dict[int, float] = field(default_factory=dict)
    batch_step_s: dict[int, float] = field(default_factory=dict)
    prefill_exchange_share: dict[int, float] = field(default_factory=dict)
    decode_exchange_share: dict[int, float] = field(default_factory=dict)
    batch_exchange_share: dict[int, float] = field(default_factory=dict)


def measure_speed(engine: Engine, settings: BenchSettings, on_start: Callable[[str], None]) -> ModelSpeed:
    """Run all rounds; `on_start` hears of each before it begins."""
    runner, speed = RoundRunner(engine), ModelSpeed()
    on_start("warm-up")
    runner.run(1, BATCH_CONTEXT_LEN, 2)
    for length in sorted({*settings.prefill_tokens, *settings.context_lens}):
        # A length that is only prefilled needs no decode steps.
        num_steps = settings.decode_tokens if length in settings.context_lens else 0
        rounds = _rounds(runner, (1, length, num_steps), settings.num_rounds, f"{length} tokens", on_start)
        if length in settings.prefill_tokens:
            best = min(rounds, key=lambda r: r.prefill_s)
            speed.prefill_s[length] = best.prefill_s
            speed.prefill_exchange_share[length] = best.prefill_exchange_s / best.prefill_s
        if num_steps:
            best = min(rounds, key=lambda r: r.step_s)
            speed.decode_step_s[length] = best.step_s
            speed.decode_exchange_share[length] = best.decode_exchange_s / best.decode_s
    for size in settings.batch_sizes:
        rounds = _rounds(
            runner, (size, BATCH_CONTEXT_LEN, BATCH_STEPS), settings.num_rounds, f"batch of {size}", on_start
        )
        best = min(rounds, key=lambda r: r.step_s)
        speed.batch_step_s[size] = best.step_s
        speed.batch_exchange_share[size] = best.decode_exchange_s / best.decode_s
    return speed


def _rounds(
    runner: RoundRunner, shape: tuple[int, int, int], num_rounds: int, name: str, on_start: Callable[[str], None]
) -> list[RoundTimes]:
    """shape: sequences, context length, decode steps."""
    results = []
    for i in range(num_rounds):
        on_start(f"{name}, round {i + 1} of {num_rounds}")
        results.append(runner.run(*shape))
    return results
