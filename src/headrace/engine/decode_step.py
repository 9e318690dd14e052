"""The step that is run again and again: one new token for each of a few sequences."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from headrace.batch import ForwardBatch
from headrace.engine.logits import DeviceLargest, Largest, Logits
from headrace.engine.rows import Row
from headrace.engine.step_inputs import StepInputs
from headrace.engine.step_sizes import StepSizes
from headrace.kernels import Kernels, Recording

_MAX_KEPT_LOGITS_BYTES = 64 * 2**20
"""Logits are the one large output. Where each number of sequences has a recording of the head, and one is made as
quickly as it is run, they make room for each other within so many bytes."""


@dataclass(frozen=True, kw_only=True)
class _Layers:
    """num_rows: of the recording; num_seqs of those are asked for."""

    num_rows: int
    recording: Recording
    hidden_states: Tensor


@dataclass(frozen=True, kw_only=True)
class _Head:
    """Shapes: logits [num_rows, vocab_size]; token_ids and largest, of those [num_rows]"""

    recording: Recording
    logits: Tensor
    token_ids: Tensor
    largest: Tensor

    def first(self, num_seqs: int) -> Logits:
        """What each run leaves of the first rows, as views: torch's code has left the CPU's caches since the last step,
        and a device is not waited for."""
        logits, token_ids, largest = self.logits[:num_seqs], self.token_ids[:num_seqs], self.largest[:num_seqs]
        if logits.is_cpu:
            return Logits(logits, Largest(token_ids.numpy().data, largest.numpy().data))
        return Logits(logits, DeviceLargest(token_ids, largest))


class _WholeStep(NamedTuple):
    """Layers and head of num_rows rows, and what each run leaves of them."""

    num_rows: int
    replay: Callable[[], None]
    logits: Logits


class DecodeStep:
    """Runs decode steps on inputs that stay where they are, so that a step of a size met before can be replayed
    instead of being asked for op by op: layers and head each by a call, or by one where all rows are to be sampled.

    What a step computes for a sequence does not depend on whether it is replayed, nor on what else is in it.

    forward: from a batch to hidden states [num_rows, hidden_size]; head: from those to logits, None for a stage
        without.
    """

    def __init__(
        self,
        kernels: Kernels,
        forward: Callable[[ForwardBatch], Tensor],
        head: Callable[[Tensor], Tensor] | None,
        inputs: StepInputs,
        sizes: StepSizes,
    ) -> None:
        self._kernels = kernels
        self._forward = forward
        self._head = head
        self.inputs = inputs
        self.sizes = sizes
        self._layers: dict[int, _Layers] = {}
        self._heads: dict[int, _Head] = {}
        self._whole: dict[int, _WholeStep] = {}
        """By number of sequences, those that have been run; made of layers and heads that are kept."""
        self._obstacle: str | None = None
        """Of steps that have no recording any more."""
        self._last: tuple[_Layers, Tensor, int] | None = None
        """What this object ran last, if it can be replayed, what it gave for that, and for how many sequences."""

    @property
    def obstacle(self) -> str | None:
        """What keeps steps from being replayed, once one has been tried."""
        if self._obstacle is not None:
            return self._obstacle
        tried = [step.recording for step in self._layers.values()]
        tried += [head.recording for head in self._heads.values()]
        return next((recording.obstacle for recording in tried if recording.obstacle), None)

    def forget(self) -> None:
        """Record anew from now on: a recording keeps the implementations that were chosen when it was made."""
        self._layers.clear()
        self._heads.clear()
        self._whole.clear()
        self._last = None

    def record(
        self,
        budget_s: float,
        on_start: Callable[[int], None] = lambda _: None,
        all_agree: Callable[[bool], bool] | None = None,
    ) -> tuple[int, ...]:
        """Record all sizes beforehand, as long as the time lasts: the largest first, which shows whether there is room,
        then from the smallest up, for which it matters most. Where steps have sizes of their own nothing is done.

        Those that are left are returned. One rank records them when they are first met. Several record a size together
        or not at all, as what exchanges within a recording meets no exchange outside of one (NCCL's user guide, "Using
        NCCL with CUDA Graphs"): steps of what is left run as the next size that there is.

        on_start: is told of each size. all_agree: whether all ranks say so; None for a rank alone.
        """
        self._whole.clear()
        end_s, recorded = time.monotonic() + budget_s, list[int]()
        agree = all_agree or bool
        for num_rows in (*self.sizes.buckets[-1:], *self.sizes.buckets[:-1]):
            if not agree(time.monotonic() < end_s):
                break
            on_start(num_rows)
            self._record_size(num_rows)
            if not agree(self.obstacle is None):
                self._obstacle = self.obstacle or "another rank cannot record them"
                break
            recorded.append(num_rows)
        left = tuple(size for size in self.sizes.buckets if size not in recorded)
        if all_agree is not None and left:
            for num_rows in left:
                self._layers.pop(num_rows, None)
                self._heads.pop(num_rows, None)
            self.sizes = StepSizes(largest=max(recorded, default=0), buckets=tuple(sorted(recorded)))
        return left

    def num_rows(self, num_seqs: int) -> int:
        """Rows that a step of num_seqs sequences computes."""
        if num_seqs > self.sizes.largest:
            return num_seqs
        num_rows = self.sizes.of(num_seqs)
        layers = self._layers.get(num_rows)
        return num_seqs if layers is not None and layers.recording.replay is None else num_rows

    def num_logits_rows(self, num_seqs: int) -> int:
        """Rows that the head computes for a step of num_seqs sequences, of which all are sampled."""
        num_rows = self.num_rows(num_seqs)
        head = self._heads.get(num_rows)
        return num_seqs if head is not None and head.recording.replay is None else num_rows

    def run(self, rows: Sequence[Row]) -> Tensor:
        """Hidden states [num_seqs, hidden_size], valid until the next run."""
        num_seqs, num_rows = len(rows), self.sizes.of(len(rows))
        self.inputs.fill(rows, num_rows)
        layers = self._layers.get(num_rows)
        if layers is None:
            layers = self._layers[num_rows] = self._record_layers(num_rows)
        elif layers.recording.replay is None:
            return self._forward(self.inputs.batch(num_seqs))
        else:
            layers.recording.replay()
        hidden_states = layers.hidden_states if num_seqs == num_rows else layers.hidden_states[:num_seqs]
        self._last = (layers, hidden_states, num_seqs) if layers.recording.replay is not None else None
        return hidden_states

    def run_to_logits(self, rows: Sequence[Row]) -> Logits | None:
        """`logits` of `run`, in one go; None, and nothing done, where one of the two is not recorded."""
        step = self._whole.get(len(rows)) or self._join(len(rows))
        if step is None:
            return None
        num_rows, replay, logits = step
        self.inputs.fill(rows, num_rows)
        self._last = None
        replay()
        return logits

    def logits(self, hidden_states: Tensor) -> Logits | None:
        """Logits of what the last run returned, valid until the next one; None of anything that was not replayed."""
        if self._last is None or self._last[1] is not hidden_states:
            return None
        layers, _, num_seqs = self._last
        head = self._heads.get(layers.num_rows)
        if head is None:
            head = self._heads[layers.num_rows] = self._record_head(layers.hidden_states)
        elif head.recording.replay is None:
            return None
        else:
            head.recording.replay()
        return head.first(num_seqs)

    def _join(self, num_seqs: int) -> _WholeStep | None:
        if num_seqs > self.sizes.largest:
            return None
        num_rows = self.sizes.of(num_seqs)
        layers, head = self._layers.get(num_rows), self._heads.get(num_rows)
        if layers is None or head is None or layers.recording.replay is None or head.recording.replay is None:
            return None
        replay = self._kernels.join_replays(layers.recording.replay, head.recording.replay)
        step = self._whole[num_seqs] = _WholeStep(num_rows, replay, head.first(num_seqs))
        return step

    def _record_size(self, num_rows: int) -> None:
        """Layers, and the head where there is one, of a step that stands for nobody."""
        self.inputs.fill((), num_rows)
        self._layers[num_rows] = layers = self._record_layers(num_rows)
        if self._head is not None and layers.recording.replay is not None:
            self._heads[num_rows] = self._record_head(layers.hidden_states)

    def _record_layers(self, num_rows: int) -> _Layers:
        batch = self.inputs.batch(num_rows)
        hidden_states, recording = self._kernels.record(lambda: self._forward(batch))
        return _Layers(num_rows=num_rows, recording=recording, hidden_states=hidden_states)

    def _record_head(self, hidden_states: Tensor) -> _Head:
        head = self._head
        assert head is not None, "a stage without a head has no logits"

        def run() -> tuple[Tensor, Tensor, Tensor]:
            logits = head(hidden_states)
            # A rank may hold no share of a small vocabulary.
            return logits, *(self._kernels.argmax(logits) if logits.shape[1] else _no_largest(logits))

        (logits, token_ids, largest), recording = self._kernels.record(run)
        if not self.sizes.buckets:
            self._make_room(logits.nbytes)
        return _Head(recording=recording, logits=logits, token_ids=token_ids, largest=largest)

    def _make_room(self, num_bytes: int) -> None:
        """Forget the heads recorded first until another one fits."""
        self._whole.clear()
        kept = sum(head.logits.nbytes for head in self._heads.values())
        for num_rows in tuple(self._heads):
            if kept + num_bytes <= _MAX_KEPT_LOGITS_BYTES:
                return
            kept -= self._heads.pop(num_rows).logits.nbytes


def _no_largest(logits: Tensor) -> tuple[Tensor, Tensor]:
    if logits.is_cpu:
        # Made by numpy: a recording takes whatever torch computes for an obstacle.
        num_rows = len(logits)
        return torch.from_numpy(np.zeros(num_rows, np.int64)), torch.from_numpy(np.full(num_rows, -np.inf, np.float32))
    return logits.new_zeros(len(logits), dtype=torch.int64), logits.new_full((len(logits),), -torch.inf)
