"""The least time each figure could take on this machine: arithmetic on measured limits, no measuring here."""

from dataclasses import dataclass

from headrace.bench.facts import WeightFacts
from headrace.bench.limits import MachineLimits


@dataclass(frozen=True, kw_only=True)
class Floor:
    """The larger of the time to read what must be read and the time to compute what must be computed, in seconds."""

    memory_s: float
    compute_s: float

    @property
    def floor_s(self) -> float:
        return max(self.memory_s, self.compute_s)

    @property
    def bound(self) -> str:
        return "memory" if self.memory_s >= self.compute_s else "compute"

    def share(self, measured_s: float) -> float:
        """How much of the limit was reached: 1 is all of it."""
        return self.floor_s / measured_s


def prefill_floor(num_tokens: int, facts: WeightFacts, limits: MachineLimits) -> Floor:
    """2 operations for each layer parameter and token, and for each head parameter once; weights are read once.

    Leaves out attention's own (quadratic in the length, small against the weights' below some thousand tokens),
    so that the floor is a little too low, never too high.
    """
    num_ops = 2 * (facts.num_layer_parameters * num_tokens + facts.num_head_parameters)
    return _floor(facts.bytes_per_step, num_ops, limits)


def decode_floor(
    num_seqs: int, context_len: int, kv_token_bytes: int, facts: WeightFacts, limits: MachineLimits
) -> Floor:
    """One step: the weights once, every sequence's keys and values, 2 operations for each parameter and sequence.

    A mixture of experts reads more than this as soon as sequences choose different experts.
    """
    num_bytes = facts.bytes_per_step + num_seqs * context_len * kv_token_bytes
    num_ops = 2 * num_seqs * (facts.num_layer_parameters + facts.num_head_parameters)
    return _floor(num_bytes, num_ops, limits)


def _floor(num_bytes: int, num_ops: int, limits: MachineLimits) -> Floor:
    return Floor(memory_s=num_bytes / limits.read_gb_per_s / 1e9, compute_s=num_ops / limits.best_gops / 1e9)
