"""What becomes of a step's rows while they are sampled."""

from collections.abc import Iterable, Sequence

from headrace.engine.logits import HostLogits
from headrace.engine.plan import SampledToken, StepResult
from headrace.engine.sampler import Sampler, SamplingRow, explain_failure
from headrace.errors import KernelError


class RowOutcomes:
    """Tokens and failures, by the index of their row.

    whole: rows of which only all their logits tell the token, or its rank.
    """

    def __init__(self, rows: Sequence[SamplingRow]) -> None:
        self.rows = rows
        self.sampled: dict[int, SampledToken] = {}
        self.failed: dict[int, str] = {}
        self.whole: list[int] = []

    def fail(self, index: int, error: KernelError) -> None:
        self.failed[index] = explain_failure(self.rows[index], error)

    def sample_whole(self, sampler: Sampler, host: HostLogits, places: Iterable[tuple[int, int]]) -> None:
        """places: of rows among the host's, and their index."""
        for place, index in places:
            try:
                self.sampled[index] = sampler.sample_row(host.row(place), self.rows[index])
            except KernelError as error:
                self.fail(index, error)

    def outcome(self) -> StepResult:
        failed = {self.rows[index].seq_id: reason for index, reason in sorted(self.failed.items())}
        return StepResult(tuple(token for _, token in sorted(self.sampled.items())), failed)
