"""What attention's kernels hand on to one another, in groups: constants that they are compiled for, and arguments.

A launch passes constants as such a dataclass, and everything else one by one; kernels put the groups together.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple


@dataclass(frozen=True, kw_only=True)
class Heads:
    """What is the same for all calls of a model's attention.

    block_d: places for an entry of a head, a power of two of at least head_dim.
    is_share: keys and values are those of the blocks that this rank owns (`reference.attention_share`).
    """

    num_kv_heads: int
    group: int
    head_dim: int
    block_d: int
    block_size: int
    is_int8: bool
    is_share: bool

    @property
    def num_heads(self) -> int:
        return self.num_kv_heads * self.group


@dataclass(frozen=True, kw_only=True)
class SoftmaxKind:
    """scheme: of `softmax.SCHEMES`. is_strict: each logit of the asynchronized one must lie between two bounds."""

    scheme: int
    has_cap: bool
    is_strict: bool


class Batch(NamedTuple):
    """Which sequences there are, and what their rows see: see `Attention.__call__`."""

    tables_ptr: Any
    table_stride: Any
    context_lens_ptr: Any
    bounds_ptr: Any
    owned_ptr: Any
    owned_stride: Any
    window: Any


class KeysAndValues(NamedTuple):
    """A cache's; scales where it holds int8."""

    keys_ptr: Any
    values_ptr: Any
    key_scales_ptr: Any
    value_scales_ptr: Any


class LogitNumbers(NamedTuple):
    """For logits in base 2."""

    scale2: Any
    cap2: Any
    unified_max2: Any
    least2: Any
    largest2: Any


class Partials(NamedTuple):
    """Of each row and split: numerators [head_dim]; a reference and a denominator, in states_ptr."""

    numerators_ptr: Any
    states_ptr: Any
    max_splits: Any
