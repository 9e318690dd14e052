"""From how many tokens of a step on a library's attention takes prompts, measured over chunks and their contexts.

One point of inflection, as those of linear layers (`tuning`): from there on the library, before it the kernel.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from enum import Enum
from typing import Any

from headrace.kernels.attention_tuning import AttentionShape, shape_from_json
from headrace.kernels.tuning import TIE
from headrace.kernels.tuning_cache import Section


class PrefillArm(Enum):
    """Implementations of a prompt's attention. KERNEL: this project's own."""

    KERNEL = "kernel"
    LIBRARY = "library"


@dataclass(frozen=True, kw_only=True, order=True)
class PrefillStep:
    """The last num_tokens of a context attend to all of it."""

    num_tokens: int
    context_len: int

    def __str__(self) -> str:
        return f"{self.num_tokens} of {self.context_len}"


PrefillTimes = Mapping[PrefillArm, Mapping[PrefillStep, float]]
"""Seconds by implementation and step."""


@dataclass(frozen=True, kw_only=True)
class TunedPrefill:
    """What was measured; the choice follows from it."""

    measured_on: str
    times: PrefillTimes

    @property
    def min_library_tokens(self) -> int | None:
        return find_library_from(self.times)


def find_library_from(times: PrefillTimes) -> int | None:
    """The tokens of a step with the least sum over steps of log(time of the arm chosen / time of the best).

    Ratios within TIE count as 1. Of equals the largest is taken, None, which is never, before all: the kernel promises
    more than the library.
    """
    kernel, library = (times[arm] for arm in PrefillArm)
    points = [None, *sorted({step.num_tokens for step in kernel}, reverse=True)]

    def regret(point: int | None) -> float:
        ratios = [
            (library[step] if point is not None and step.num_tokens >= point else kernel[step])
            / min(kernel[step], library[step])
            for step in kernel
        ]
        return round(sum(math.log(ratio) for ratio in ratios if ratio > TIE), 9)

    return min(points, key=regret)


def explain_prefill(tuned: TunedPrefill | None) -> str:
    """One line for people: what is chosen, and on what grounds."""
    if tuned is None:
        return "the kernel (not measured here, the default)"
    least = tuned.min_library_tokens
    choice = "the kernel" if least is None else f"the kernel below {least} tokens, then the library where it can"
    return f"{choice} (measured on {tuned.measured_on})"


def _to_json(shape: AttentionShape, tuned: TunedPrefill) -> dict[str, Any]:
    return {
        **asdict(shape),
        "cache_format": shape.cache_format.value,
        "measured_on": tuned.measured_on,
        "library_from": tuned.min_library_tokens,
        "steps": [
            asdict(step) | {"seconds": {arm.value: seconds[step] for arm, seconds in tuned.times.items()}}
            for step in tuned.times[PrefillArm.KERNEL]
        ],
    }


def _from_json(entry: dict[str, Any]) -> tuple[AttentionShape, TunedPrefill]:
    times: dict[PrefillArm, dict[PrefillStep, float]] = {arm: {} for arm in PrefillArm}
    for row in entry["steps"]:
        step = PrefillStep(num_tokens=int(row["num_tokens"]), context_len=int(row["context_len"]))
        for arm, seconds in times.items():
            seconds[step] = float(row["seconds"][arm.value])
    return shape_from_json(entry), TunedPrefill(measured_on=str(entry["measured_on"]), times=times)


PREFILL = Section(name="prefill", to_json=_to_json, from_json=_from_json)
