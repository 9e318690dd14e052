"""How a prompt becomes one vector."""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any, Self

from headrace.errors import RequestError, nearest_name


class Pooling(Enum):
    """LAST: the last token's hidden state, which has seen all others. MEAN: the mean over all tokens."""

    LAST = "last"
    MEAN = "mean"


@dataclass(frozen=True, kw_only=True)
class PoolingParams:
    """Settings of one embedding.

    pooling: which hidden states it is made of: "last" (as vLLM for decoders) or "mean".
    normalize: the vector has the Euclidean length 1.

    Raises:
        RequestError: a value that is not allowed.
    """

    pooling: Pooling = Pooling.LAST
    normalize: bool = True

    def __post_init__(self) -> None:
        allowed = [pooling.value for pooling in Pooling]
        given = self.pooling.value if isinstance(self.pooling, Pooling) else self.pooling
        if given not in allowed:
            raise RequestError(f"pooling is {given!r:.80}; allowed: {' or '.join(allowed)}")
        if not isinstance(self.normalize, bool):
            raise RequestError(f"normalize is {self.normalize!r:.80}; allowed: true or false")
        object.__setattr__(self, "pooling", Pooling(given))

    @property
    def n(self) -> int:
        """Outputs of a request, as `SamplingParams.n`."""
        return 1

    def to_mapping(self) -> dict[str, Any]:
        """Plain data, fit for JSON; `from_mapping` reads it back."""
        return {"pooling": self.pooling.value, "normalize": self.normalize}

    @classmethod
    def from_mapping(cls, given: Mapping[str, Any]) -> Self:
        """Settings from names and values, such as a JSON object.

        Raises:
            RequestError: an unknown name, with the nearest known one; or a value that is not allowed.
        """
        for name in given:
            if name not in cls.__dataclass_fields__:
                known = list(cls.__dataclass_fields__)
                raise RequestError(f"unknown pooling parameter '{name:.80}'; {nearest_name(name[:80], known)}")
        return cls(**given)
