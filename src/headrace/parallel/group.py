"""The one door through which ranks exchange tensors."""

from typing import Protocol

from torch import Tensor


class Group(Protocol):
    """Ranks that run the same layers on different shards.

    Layers call these and never ask whether they are distributed: with one rank each call is the identity.
    """

    @property
    def rank(self) -> int: ...

    @property
    def world_size(self) -> int: ...

    def all_reduce_(self, tensor: Tensor) -> None:
        """Replace the tensor on every rank by the sum over ranks."""
        ...

    def all_gather(self, tensor: Tensor) -> Tensor:
        """Concatenate the ranks' tensors along the last dimension, rank 0 first; sizes there may differ by rank."""
        ...


class OneRankGroup:
    """A group of one: nothing to exchange."""

    rank = 0
    world_size = 1

    def all_reduce_(self, tensor: Tensor) -> None:
        pass

    def all_gather(self, tensor: Tensor) -> Tensor:
        return tensor
