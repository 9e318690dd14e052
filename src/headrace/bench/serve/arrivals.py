"""When requests arrive, in an open loop: whether the server keeps up or not."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from headrace.errors import ConfigError


@dataclass(frozen=True)
class OpenLoop:
    """Requests at `rate_per_s` on average, `burst_size` of them at the same instant.

    Intervals between bursts follow a gamma distribution of shape `burstiness` and mean burst_size / rate_per_s, so that
    their variance is mean^2 / burstiness: 1 is a Poisson process, less is burstier, more is more regular. An infinite
    rate sends everything at once.
    Source: vLLM's --request-rate and --burstiness.
    """

    rate_per_s: float
    burstiness: float = 1.0
    burst_size: int = 1

    def __post_init__(self) -> None:
        if not self.rate_per_s > 0:
            raise ConfigError(f"--rate is {self.rate_per_s:g}; it must be above 0 requests per second")
        if not 0 < self.burstiness < float("inf"):
            raise ConfigError(f"--burstiness is {self.burstiness:g}; it must be above 0, and 1 is a Poisson process")
        if self.burst_size < 1:
            raise ConfigError(f"--burst-size is {self.burst_size}; it must be at least 1")

    def times_s(self, rng: np.random.Generator) -> Iterator[float]:
        """Seconds from the start, without end; the first request comes at 0."""
        now_s = 0.0
        mean_s = self.burst_size / self.rate_per_s
        while True:
            for _ in range(self.burst_size):
                yield now_s
            if mean_s:
                now_s += float(rng.gamma(self.burstiness, mean_s / self.burstiness))


@dataclass(frozen=True)
class ClosedLoop:
    """`concurrency` clients; each sends its next request when the last one has been answered."""

    concurrency: int

    def __post_init__(self) -> None:
        if self.concurrency < 1:
            raise ConfigError(f"--concurrency is {self.concurrency}; it must be at least 1")


Arrivals = OpenLoop | ClosedLoop
