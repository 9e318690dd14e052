"""Where and when ranks exchange something: the names that the ledger counts by and `volume` predicts by."""

from enum import Enum


class Phase(Enum):
    """A step with at least one prompt token is prefill; so is what a preemption makes compute again."""

    PREFILL = "prefill"
    DECODE = "decode"


class Site:
    """Names of the places where ranks exchange something."""

    EMBEDDING = "embedding"
    LOGITS = "logits"
    CANDIDATES = "candidates"

    @staticmethod
    def attention(layer: int) -> str:
        """The sum of a layer's attention outputs."""
        return f"layers.{layer}.attention"

    @staticmethod
    def mlp(layer: int) -> str:
        """The sum of a layer's feed-forward outputs."""
        return f"layers.{layer}.mlp"

    @staticmethod
    def context(layer: int) -> str:
        """What ranks exchange that hold shares of one KV head's context."""
        return f"layers.{layer}.context"

    @staticmethod
    def boundary(stage: int) -> str:
        """Between a stage and the next."""
        return f"boundary.{stage}"
