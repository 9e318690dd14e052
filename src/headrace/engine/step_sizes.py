"""For how many sequences decode steps are recorded; no torch."""

from bisect import bisect_left
from dataclasses import dataclass

from headrace.config.checks import check_at_least_one

MAX_EXACT_SIZE = 64
"""Beyond so many sequences a step's arithmetic dwarfs what asking for its ops costs on a CPU."""


@dataclass(frozen=True, kw_only=True)
class StepSizes:
    """largest: no step of more sequences is recorded.

    buckets: the sizes there are, ascending, where a recording costs much: a step of another size is padded to the next.
        Empty where each number of sequences is a size of its own.
    """

    largest: int
    buckets: tuple[int, ...] = ()

    def of(self, num_seqs: int) -> int:
        """Rows of the recording that a step of num_seqs sequences, at most `largest`, runs as."""
        return self.buckets[bisect_left(self.buckets, num_seqs)] if self.buckets else num_seqs


def exact_sizes() -> StepSizes:
    return StepSizes(largest=MAX_EXACT_SIZE)


def bucket_sizes(max_num_seqs: int) -> StepSizes:
    """1, 2, 4, 8 and so on, and max_num_seqs: no step is padded to twice its size."""
    check_at_least_one("max_num_seqs", max_num_seqs)
    buckets = [2**i for i in range(max_num_seqs.bit_length()) if 2**i < max_num_seqs]
    return StepSizes(largest=max_num_seqs, buckets=(*buckets, max_num_seqs))
