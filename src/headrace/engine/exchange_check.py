"""Whether a rank exchanged what its plans predict: run all the time, because it is cheap."""

import logging
import time
from collections import Counter
from collections.abc import Iterable, Sequence

from headrace.costs.candidates import candidates_payload_bytes, draws_payload_bytes, row_record
from headrace.costs.exchanges import Layout
from headrace.costs.sharding import shard_vocabulary
from headrace.costs.sites import Phase
from headrace.costs.steps import GREEDY_ROW_BYTES, Event, ForwardPass, Run, SampledRows, WholeRows
from headrace.costs.volume import ExchangeKind, RankVolume, Sums, add_totals, differences, totals_of
from headrace.engine.sampler import SamplingRow
from headrace.engine.sharded_sampler import GATHERED_ROWS
from headrace.parallel.group import Group
from headrace.parallel.ledger import LedgerRow

logger = logging.getLogger(__name__)

_INTERVAL_S = 1.0
"""A comparison takes 0.4 ms with two exchanges in each of 22 layers."""


class ExchangeCheck:
    """What this rank has run, the exchanges that follow from it, and whether the ledger has just those.

    Fed with what is known before anything is exchanged: tokens of a pass, parameters of rows. Only how many rows were
    gathered because candidates did not suffice depends on the logits, and is taken from the sampler.
    """

    def __init__(self, layout: Layout, rank: int, groups: Sequence[Group]) -> None:
        self._rank = rank
        self._groups = groups
        self._volume = RankVolume(layout, rank)
        self._vocab_size = layout.model.vocab_size
        self._largest_shard = len(shard_vocabulary(self._vocab_size, 0, layout.parallel.tensor_parallel_size))
        self._run: Run = Counter()
        self._recent: Run = Counter()
        """Not compared yet."""
        self._predicted: dict[ExchangeKind, Sums] = {}
        self._checked_s = time.monotonic()
        self._has_reported = False
        self._step: Sequence[Event] = ()
        """The last one that was begun."""
        self._fallback_rows = 0

    def events(
        self,
        phase: Phase,
        num_tokens: int,
        prompt_rows: Iterable[int],
        sampling: Sequence[SamplingRow],
        num_logits_rows: int,
    ) -> list[Event]:
        """What a step is about to do, in order.

        num_tokens: rows that pass through the layers, those that fill a recorded step up included; num_logits_rows: so
            of the head. prompt_rows: rows gathered whole at once, to score prompts.
        """
        events: list[Event] = [ForwardPass(phase, num_tokens)]
        events += [WholeRows(phase, num_rows) for num_rows in prompt_rows]
        if sampling:
            events.append(self._sampled_rows(phase, sampling, num_logits_rows))
        return events

    def begin_step(self, events: Sequence[Event]) -> None:
        self._step = events

    @property
    def num_calls_of_step(self) -> int:
        """Exchanges made since the step was begun: those that the ledger has and no step before it explains."""
        counted, predicted = totals_of(self._rows()), self.predicted()
        return sum(sums.num_calls for sums in counted.values()) - sum(sums.num_calls for sums in predicted.values())

    @property
    def step(self) -> Sequence[Event]:
        """What the step that was begun last is to do."""
        return self._step

    def end_step(self, fallback_rows: int) -> None:
        """Compare now and then, and report the first difference as an error in the log.

        fallback_rows: gathered by the sampler in all steps so far.
        """
        self._recent.update(self._step)
        if fallback_rows > self._fallback_rows:
            self._add_fallback(fallback_rows - self._fallback_rows)
            self._fallback_rows = fallback_rows
        now_s = time.monotonic()
        if now_s - self._checked_s >= _INTERVAL_S:
            self._checked_s = now_s
            self.compare()

    def compare(self) -> None:
        """Report the first difference, if there is one, as an error in the log."""
        predicted = self.predicted()
        if self._has_reported or totals_of(self._rows()) == predicted:
            return
        self._has_reported = True
        found = self.differences()
        logger.error("rank %d exchanged other bytes than predicted, in %d places: %s", self._rank, len(found), found[0])

    def predicted(self) -> dict[ExchangeKind, Sums]:
        """What has been exchanged so far, by formula."""
        # What was added up before is not added up again: the kinds of sampling are many, in a long run.
        add_totals(self._predicted, self._volume.totals(self._recent))
        self._run += self._recent
        self._recent.clear()
        return dict(self._predicted)

    def _sampled_rows(self, phase: Phase, rows: Sequence[SamplingRow], num_logits_rows: int) -> SampledRows:
        if all(row.takes_largest for row in rows):
            return SampledRows(phase, num_logits_rows, len(rows) * GREEDY_ROW_BYTES)
        records = [
            row_record(
                row.params,
                changes_logits=row.changes_logits,
                vocab_size=self._vocab_size,
                largest_shard=self._largest_shard,
            )
            for row in rows
        ]
        return SampledRows(phase, num_logits_rows, candidates_payload_bytes(records), draws_payload_bytes(records))

    def _add_fallback(self, num_rows: int) -> None:
        whole, rest = divmod(num_rows, GATHERED_ROWS)
        phase = self._step[0].phase
        for rows in [GATHERED_ROWS] * whole + [rest] * bool(rest):
            self._recent[WholeRows(phase, rows)] += 1

    def differences(self) -> list[str]:
        """One line for each figure that differs; none if ledger and prediction agree to the byte."""
        return list(differences(self._volume.rows(self._run + self._recent), self._rows()))

    def _rows(self) -> list[LedgerRow]:
        return [row for group in self._groups for row in group.ledger_rows()]
