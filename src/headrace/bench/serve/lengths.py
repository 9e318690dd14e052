"""How long prompts and outputs are, and how they are mixed."""

import math
import re
from dataclasses import dataclass

import numpy as np

from headrace.errors import ConfigError

_MAX_SIGMAS = 3.0
_LENGTH = re.compile(r"(?P<low>\d+)(?:-(?P<high>\d+)|~(?P<sigma>\d+(?:\.\d+)?|\.\d+))?")
_GRAMMAR = "a number of tokens such as 512, a range such as 256-1024, or median~sigma such as 512~0.5 (lognormal)"


@dataclass(frozen=True)
class Length:
    """A distribution of token counts: uniform over low .. high, both included, or lognormal.

    Lognormal: median * exp(sigma * z), z standard normal within three deviations (drawn anew otherwise), rounded, at
    least 1. A fixed length is a uniform one with low == high.
    """

    low: int
    high: int
    sigma: float | None = None

    @classmethod
    def parse(cls, text: str, name: str) -> "Length":
        """
        Raises:
            ConfigError: not a length, or one of no token.
        """
        match = _LENGTH.fullmatch(text.strip())
        if match is None:
            raise ConfigError(f"{name} has the length '{text}'; give {_GRAMMAR}")
        low = int(match["low"])
        high = int(match["high"] or low)
        if low < 1 or high < low:
            raise ConfigError(f"{name} has the length '{text}'; lengths are at least 1, and ranges go upwards")
        return cls(low, high, float(match["sigma"]) if match["sigma"] else None)

    def sample(self, rng: np.random.Generator) -> int:
        if self.sigma is None:
            return int(rng.integers(self.low, self.high, endpoint=True))
        z = rng.standard_normal()
        while abs(z) > _MAX_SIGMAS:
            z = rng.standard_normal()
        return max(1, round(self.low * math.exp(self.sigma * z)))

    def __str__(self) -> str:
        if self.sigma is not None:
            return f"{self.low}~{self.sigma:g}"
        return str(self.low) if self.low == self.high else f"{self.low}-{self.high}"


@dataclass(frozen=True)
class Share:
    """One kind of request and its share of all, 0 to 1."""

    prompt: Length
    output: Length
    share: float


@dataclass(frozen=True)
class RequestMix:
    """Kinds of requests, drawn independently by their shares."""

    shares: tuple[Share, ...]

    @classmethod
    def parse(cls, text: str) -> "RequestMix":
        """`PROMPT:OUTPUT[:WEIGHT],...`; weights need not add up to 1, and are 1 where left out.

        Raises:
            ConfigError: anything else.
        """
        kinds = [_parse_kind(part, text) for part in text.split(",")]
        total = sum(weight for _, _, weight in kinds)
        return cls(tuple(Share(prompt, output, weight / total) for prompt, output, weight in kinds))

    def sample(self, rng: np.random.Generator) -> tuple[int, int]:
        """Tokens of a prompt and of its output."""
        index = rng.choice(len(self.shares), p=[share.share for share in self.shares]) if len(self.shares) > 1 else 0
        share = self.shares[index]
        return share.prompt.sample(rng), share.output.sample(rng)

    def __str__(self) -> str:
        return ",".join(f"{s.prompt}:{s.output}" + (f":{s.share:.3g}" if s.share < 1 else "") for s in self.shares)


def _parse_kind(part: str, text: str) -> tuple[Length, Length, float]:
    fields = part.split(":")
    if len(fields) not in (2, 3):
        raise ConfigError(f"--request-mix is '{text}'; give PROMPT:OUTPUT[:WEIGHT],... where a length is {_GRAMMAR}")
    prompt, output = (Length.parse(field, "--request-mix") for field in fields[:2])
    return prompt, output, _parse_weight(fields[2], text) if len(fields) == 3 else 1.0


def _parse_weight(field: str, text: str) -> float:
    try:
        weight = float(field)
    except ValueError:
        weight = math.nan
    if not (math.isfinite(weight) and weight > 0):
        raise ConfigError(f"--request-mix is '{text}'; the weight '{field}' must be a number above 0")
    return weight
