"""How a collective is carried out, and what that puts on the wire.

Three sizes are kept apart everywhere:
    payload_bytes     of the tensor that a rank hands to a call
    wire_bytes        that one rank sends for it, under a named algorithm; headers of the transport come on top
    total wire bytes  the sum of wire_bytes over the ranks of the group
"""

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
DIRECT_MAX_BYTES = 2 * 2**10
"""The same for more ranks, which send n / 2 times as much that way."""

INT8_MIN_BYTES = 64 * 2**10
"""Payload from which a sum travels in 8 bits, if it may: below, its time is that of its meetings."""

_INT8_GROUP = 64
_INT8_SCALE_BYTES = 4


@dataclass(frozen=True, kw_only=True)
class Summands:
    """What an all-reduce is given: [num_rows, row_size], summand_bytes of an element handed over, sum_bytes of an
    element of the result.

    The two differ where partial sums are float32 and activations are not: a sum is rounded once, then travels rounded.
    """

    num_rows: int
    row_size: int
    summand_bytes: int
    sum_bytes: int
    may_quantize: bool = False

    @property
    def num_elements(self) -> int:
        return self.num_rows * self.row_size

    @property
    def payload_bytes(self) -> int:
        return self.num_elements * self.summand_bytes


def all_reduce_algorithm(summands: Summands, world_size: int) -> str:
    """What Headrace's own groups use. All ranks agree, since nothing but the size of the message matters."""
    if summands.may_quantize and summands.payload_bytes >= INT8_MIN_BYTES:
        return TWO_SHOT_INT8
    max_bytes = DIRECT_MAX_BYTES_OF_TWO if world_size == 2 else DIRECT_MAX_BYTES
    return DIRECT if summands.payload_bytes <= max_bytes else TWO_SHOT


def summand_bytes(dtype: AllReduceDtype, activation_bytes: int) -> int:
    """Bytes of an element that a rank hands to an all-reduce."""
    return {AllReduceDtype.FLOAT32: 4, AllReduceDtype.BFLOAT16: 2}.get(dtype, activation_bytes)


def all_reduce_wire_bytes(summands: Summands, algorithm: str, rank: int, world_size: int) -> int:
    """Bytes that `rank` sends in one all-reduce of S bytes among n ranks.

    direct         (n - 1) S: its whole tensor to each other rank
    two_shot       its tensor but for its own part, then the sum of its own part to each other rank
    two_shot_int8  the same of what 8 bits and scales take
    ring           all parts but number rank + 1, then all sums but number rank + 2: 2 (n - 1) / n S, if n divides it

    Part r is that of `shard_range`: parts differ by at most one element (one group of 64, in 8 bits), and so do the
    ranks' figures.
    """
    if world_size == 1:
        return 0
    if algorithm == DIRECT:
        return (world_size - 1) * summands.payload_bytes
    if algorithm == TWO_SHOT_INT8:
        parts = [_int8_bytes(summands, shard) for shard in _shards(_num_int8_groups(summands), world_size)]
        return sum(parts) + (world_size - 2) * parts[rank]
    parts = [len(shard) for shard in _shards(summands.num_elements, world_size)]
    if algorithm == TWO_SHOT:
        others = summands.num_elements - parts[rank]
        return others * summands.summand_bytes + (world_size - 1) * parts[rank] * summands.sum_bytes
    if algorithm == RING:
        summed = summands.num_elements - parts[(rank + 1) % world_size]
        passed_on = summands.num_elements - parts[(rank + 2) % world_size]
        return summed * summands.summand_bytes + passed_on * summands.sum_bytes
    raise ValueError(f"'{algorithm}' is no algorithm of an all-reduce")


def _shards(num_units: int, world_size: int) -> list[range]:
    return [shard_range(num_units, rank, world_size) for rank in range(world_size)]


def _num_int8_groups(summands: Summands) -> int:
    """They begin anew with each row, so that a row's values do not depend on those before it."""
    return summands.num_rows * -(-summands.row_size // _INT8_GROUP)


def _int8_bytes(summands: Summands, groups: range) -> int:
    """Of a part: a byte for each value and a scale for each group, the last of a row being what is left of it."""
    per_row = -(-summands.row_size // _INT8_GROUP)

    def first_value(group: int) -> int:
        row, index = divmod(group, per_row)
        return row * summands.row_size + index * _INT8_GROUP

    return first_value(groups.stop) - first_value(groups.start) + _INT8_SCALE_BYTES * len(groups)


def all_gather_wire_bytes(part_bytes: int, world_size: int) -> int:
    """Bytes that a rank sends: its part to each other rank. A ring passes as much on from rank to rank, if parts are
    equal."""
    return (world_size - 1) * part_bytes
