"""How long exchanges take, and which layout they leave fastest.

    time = sum over calls of ( alpha(message size) + wire_bytes / beta )

alpha is what a call costs however little it sends: meeting the others, waking up, the transport's own work. It has a
value for each size class, since transports change their ways with the size; a decode step is mostly alpha, a prefill
mostly beta. What ranks wait for each other because their work is uneven is not in it.

Source: the postal model, as in Thakur, Rabenseifner, Gropp, "Optimization of Collective Communication Operations in
MPICH" (2005), section 3, with the bytes counted by `exchanges` in place of its closed forms.
"""

from bisect import bisect_left
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from headrace.costs.exchanges import Exchange, Layout
from headrace.costs.steps import Event
from headrace.costs.volume import RankVolume
from headrace.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Link:
    """What joins the ranks of a group.

    max_bytes: ascending, the largest message of each size class but the last, which has no limit.
    alpha_s: of each size class, one more than max_bytes.
    bytes_per_s: that one rank sends.
    """

    alpha_s: tuple[float, ...]
    bytes_per_s: float
    max_bytes: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if len(self.alpha_s) != len(self.max_bytes) + 1 or list(self.max_bytes) != sorted(set(self.max_bytes)):
            raise ConfigError(
                f"a link has {len(self.alpha_s)} alphas for the sizes {self.max_bytes}; give ascending sizes, and one "
                "alpha more than sizes"
            )
        if min(self.alpha_s) < 0 or not self.bytes_per_s > 0:
            raise ConfigError(f"alpha_s {self.alpha_s} must not be negative, bytes_per_s {self.bytes_per_s} be above 0")

    def call_s(self, payload_bytes: int, wire_bytes: int) -> float:
        return self.alpha_s[bisect_left(self.max_bytes, payload_bytes)] + wire_bytes / self.bytes_per_s


class StepTimes(NamedTuple):
    """latency_s: from a step's beginning on the first stage to its end on the last one.
    interval_s: from the end of one step to that of the next, where each stage always has a step to work at.
    """

    latency_s: float
    interval_s: float


def exchanges_s(exchanges: Iterable[Exchange], links: Mapping[str, Link]) -> float:
    """Of one rank, one call after the other; links: by name of the group. A message counts where it is sent."""
    return sum(
        exchange.calls_per_site
        * len(exchange.sites)
        * links[exchange.group].call_s(exchange.payload_bytes, exchange.wire_bytes)
        for exchange in exchanges
        if exchange.operation != "recv"
    )


def step_times(layout: Layout, events: Iterable[Event], compute_s: float, links: Mapping[str, Link]) -> StepTimes:
    """A step of these passes: on one rank it would take compute_s, on both counts.

    A stage computes its share of the layers, and a rank 1 / t of that: a lower bound, since neither the head nor what
    all ranks of a stage compute alike is divided so. Tensor parallelism shortens both times and pays 2 L calls of
    alpha; pipelines shorten the interval alone, and pay a hop for each boundary.
    """
    events = tuple(events)
    size, num_layers = layout.parallel.tensor_parallel_size, layout.model.num_hidden_layers
    stages_s = []
    for stage, layers in enumerate(layout.stages()):
        rank = RankVolume(layout, stage * size)
        exchanged_s = sum(exchanges_s(rank.exchanges(event), links) for event in events)
        stages_s.append(compute_s * len(layers) / num_layers / size + exchanged_s)
    return StepTimes(latency_s=sum(stages_s), interval_s=max(stages_s))
