"""How a collective is carried out, and what that puts on the wire.

Three sizes are kept apart everywhere:
    payload_bytes     of the tensor that a rank hands to a call
    wire_bytes        that one rank sends for it, under a named algorithm; headers of the transport come on top
    total wire bytes  the sum of wire_bytes over the ranks of the group
"""

from collections.abc import Callable
from dataclasses import dataclass

from headrace.config import AllReduceDtype
from headrace.costs.sharding import shard_range

DIRECT = "direct"
"""Each rank sends what it has to each other rank."""
TWO_SHOT = "two_shot"
"""All-reduce as reduce-scatter and all-gather, both direct: each rank adds up its part of the elements."""
TWO_SHOT_INT8 = "two_shot_int8"
"""The same, summands and sums travelling as int8 values with a float32 scale for each 64."""
RING = "ring"
"""All-reduce in 2 (n - 1) rounds, in each of which a rank sends one part to its neighbour."""
POINT_TO_POINT = "point_to_point"

DIRECT_MAX_BYTES_OF_TWO = 256 * 2**10
"""Payload up to which two ranks exchange whole tensors: no more bytes than in two shots, and half the meetings."""
DIRECT_MAX_BYTES = 32 * 2**10
"""The same for more ranks, which send n / 2 times as much that way."""

_INT8_BLOCK = 64


@dataclass(frozen=True, kw_only=True)
class Summands:
    """What an all-reduce is given: summand_bytes of an element handed over, sum_bytes of an element of the result.

    The two differ where partial sums are float32 and activations are not: a sum is rounded once, then travels rounded.
    """

    num_elements: int
    summand_bytes: int
    sum_bytes: int
    may_quantize: bool = False

    @property
    def payload_bytes(self) -> int:
        return self.num_elements * self.summand_bytes


def all_reduce_algorithm(summands: Summands, world_size: int) -> str:
    """What Headrace's own groups use. All ranks agree, since nothing but the size of the message matters."""
    max_bytes = DIRECT_MAX_BYTES_OF_TWO if world_size == 2 else DIRECT_MAX_BYTES
    if summands.payload_bytes <= max_bytes:
        return DIRECT
    return TWO_SHOT_INT8 if summands.may_quantize else TWO_SHOT


def summand_bytes(dtype: AllReduceDtype, activation_bytes: int) -> int:
    """Bytes of an element that a rank hands to an all-reduce."""
    return {AllReduceDtype.FLOAT32: 4, AllReduceDtype.BFLOAT16: 2}.get(dtype, activation_bytes)


def all_reduce_wire_bytes(summands: Summands, algorithm: str, rank: int, world_size: int) -> int:
    """Bytes that `rank` sends in one all-reduce of S bytes among n ranks.

    direct    (n - 1) S: its whole tensor to each other rank
    two_shot  its tensor but for its own part, then the sum of its own part to each other rank
    ring      all parts but number rank + 1, then all sums but number rank + 2: 2 (n - 1) / n S, if n divides it

    Part r is that of `shard_range`: parts differ by at most one element, and so do the ranks' figures.
    """
    if world_size == 1:
        return 0
    parts = [len(shard_range(summands.num_elements, i, world_size)) for i in range(world_size)]
    if algorithm == DIRECT:
        return (world_size - 1) * summands.payload_bytes
    if algorithm == TWO_SHOT:
        return _two_shot(parts, rank, lambda n: n * summands.summand_bytes, lambda n: n * summands.sum_bytes)
    if algorithm == TWO_SHOT_INT8:
        return _two_shot(parts, rank, _int8_bytes, _int8_bytes)
    if algorithm == RING:
        kept = (
            parts[(rank + 1) % world_size] * summands.summand_bytes
            + parts[(rank + 2) % world_size] * summands.sum_bytes
        )
        return summands.num_elements * (summands.summand_bytes + summands.sum_bytes) - kept
    raise ValueError(f"'{algorithm}' is no algorithm of an all-reduce")


def _two_shot(parts: list[int], rank: int, as_summand: Callable[[int], int], as_sum: Callable[[int], int]) -> int:
    others = sum(as_summand(part) for peer, part in enumerate(parts) if peer != rank)
    return others + (len(parts) - 1) * as_sum(parts[rank])


def _int8_bytes(num_elements: int) -> int:
    return num_elements + 4 * -(-num_elements // _INT8_BLOCK)


def all_gather_wire_bytes(part_bytes: int, world_size: int) -> int:
    """Bytes that a rank sends: its part to each other rank. A ring passes as much on from rank to rank, if parts are
    equal."""
    return (world_size - 1) * part_bytes
