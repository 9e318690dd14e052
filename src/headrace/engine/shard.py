"""What one of several ranks says of its share of the logits, in the words of `costs.candidates`."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import NamedTuple, Protocol

from torch import Tensor

from headrace.costs.candidates import LARGEST_WORDS, RowRecord
from headrace.engine.logits import AnyLargest
from headrace.engine.sampler import SamplingRow


@dataclass(frozen=True)
class RecordedRows:
    """A step's rows, and what each rank brings of each."""

    rows: Sequence[SamplingRow]
    records: Sequence[RowRecord]

    @cached_property
    def starts(self) -> list[int]:
        """Where each row's record begins among the words of a rank, and last where they end."""
        sizes = [record.num_words for record in self.records]
        return list(accumulate(sizes, initial=LARGEST_WORDS * len(self.rows)))

    @cached_property
    def drawn(self) -> list[int]:
        """The rows that are drawn by an owner."""
        return [index for index, record in enumerate(self.records) if record.is_drawn_by_owner]


class OwnWords(NamedTuple):
    """What a rank brings of a step's rows.

    draw: from what all ranks have brought to the tokens that this rank draws for `RecordedRows.drawn`, and NO_TOKEN for
        those that others draw. Whatever it is given it returns, for rows that fail as well.

    Shapes: words [num_words] int32; draw takes [world_size, num_words] int32, returns [num_drawn] int32
    """

    words: Tensor
    draw: Callable[[Tensor], Tensor]


class Shard(Protocol):
    """A rank's share of the vocabulary. What it says lies where the logits do.

    largest: see `ShardedSampler.sample`.

    Shapes: logits [num_rows, tokens of the shard]
    Raises:
        ShapeError: logits are not those of num_rows rows.
    """

    def largest_words(self, logits: Tensor, num_rows: int, largest: AnyLargest | None) -> Tensor:
        """[num_rows * LARGEST_WORDS] int32"""
        ...

    def say(self, logits: Tensor, asked: RecordedRows, largest: AnyLargest | None) -> OwnWords: ...
