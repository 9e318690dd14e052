"""What a run is asked for."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from headrace.bench.serve.address import Address
from headrace.bench.serve.arrivals import Arrivals, ClosedLoop, OpenLoop
from headrace.bench.serve.dataset import Sample
from headrace.bench.serve.lengths import RequestMix
from headrace.bench.serve.metrics import Goodput
from headrace.bench.serve.requests import Route
from headrace.errors import ConfigError

MAX_AUTO_LEVELS = 20


@dataclass(frozen=True, kw_only=True)
class Target:
    """Where requests go. model: None asks the server."""

    address: Address
    route: Route = Route.COMPLETIONS
    model: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    extra_body: Mapping[str, Any] = field(default_factory=dict)
    timeout_s: float = 600.0
    verify: bool = True


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What is asked.

    vocab_size: prompts are token ids below it; None makes them of words. samples: a file's prompts.
    """

    mix: RequestMix
    vocab_size: int | None = None
    shared_prefix_tokens: int = 0
    samples: tuple[Sample, ...] = ()
    seed: int = 0

    def check_against(self, route: Route) -> None:
        """
        Raises:
            ConfigError: prompts that this route does not take.
        """
        needs_chat = any(sample.messages is not None for sample in self.samples)
        needs_ids = self.vocab_size is not None or any(isinstance(sample.prompt, list) for sample in self.samples)
        if route is Route.CHAT and needs_ids:
            raise ConfigError("prompts of token ids need --endpoint completions")
        if route is Route.COMPLETIONS and needs_chat:
            raise ConfigError("prompts that are messages need --endpoint chat")
        if self.samples and (self.shared_prefix_tokens or self.vocab_size is not None):
            raise ConfigError("--shared-prefix-tokens and --vocab-size are for random prompts, not for those of a file")


@dataclass(frozen=True, kw_only=True)
class Load:
    """How much is asked, and when. At least one of num_requests and duration_s is there; the first one met ends it."""

    arrivals: Arrivals
    num_requests: int | None
    duration_s: float | None = None
    warmup: int = 1

    def __post_init__(self) -> None:
        if self.num_requests is None and self.duration_s is None:
            raise ConfigError("give --num-requests, --duration or both")
        if (
            self.num_requests is None
            and isinstance(self.arrivals, OpenLoop)
            and self.arrivals.rate_per_s == float("inf")
        ):
            raise ConfigError("--rate inf sends everything at once; say how much with --num-requests")


class SweepOver(Enum):
    RATE = "rate"
    CONCURRENCY = "concurrency"


@dataclass(frozen=True)
class Sweep:
    """Loads one after the other. levels: their rates or concurrencies; empty doubles from 1 until the server gives no
    more."""

    over: SweepOver
    levels: tuple[float, ...] = ()

    def arrivals(self, level: float, given: Arrivals) -> Arrivals:
        """The given arrivals at another rate or concurrency."""
        if self.over is SweepOver.CONCURRENCY:
            return ClosedLoop(int(level))
        if isinstance(given, OpenLoop):
            return OpenLoop(level, given.burstiness, given.burst_size)
        return OpenLoop(level)


@dataclass(frozen=True, kw_only=True)
class ServeBench:
    """All of it."""

    target: Target
    workload: Workload
    load: Load
    goodput: Goodput | None = None
    sweep: Sweep | None = None
