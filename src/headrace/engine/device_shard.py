"""A rank's share of the logits, read where it lies on a device: nothing here waits for one.

Candidates, sums and draws of many rows are computed in a few launches, and one gather makes words of them. Sums are
those of weights in float64, so that rounding them adds nothing to what float32 weights differ by on the host.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from headrace.engine.candidates import NO_TOKEN
from headrace.engine.device_draw import WeightSums, draw_by_owner, shard_weights
from headrace.engine.device_logits import changed_logits
from headrace.engine.logits import AnyLargest, DeviceLargest, HostLogits
from headrace.engine.sampler import Sampler
from headrace.engine.shard import OwnWords, RecordedRows
from headrace.engine.transfers import upload
from headrace.kernels import Kernels

_MAX_ROWS = 32
"""Handled at once: weights in float64 take 8 bytes for each logit."""

_CONSTANTS = np.array([NO_TOKEN, np.float32(-np.inf).view(np.int32), 0], np.int32)
"""What empty places hold: of ids, of logits, and of sums."""


@dataclass(frozen=True, kw_only=True)
class _Part:
    """Some rows that are alike in what they change and in who draws them.

    words: ids of num_places candidates, their logits, and a sum of weights; then the same of raw logits. sums: of rows
        drawn by an owner.

    Shapes: words [num_rows, 2 * (num_places + 1 + num_raw_places + 1)] int32
    """

    indices: Sequence[int]
    num_places: int
    num_raw_places: int
    words: Tensor
    sums: WeightSums | None


_NOTHING = _Part(indices=(), num_places=0, num_raw_places=0, words=torch.empty(0, 0, dtype=torch.int32), sums=None)
"""What a rank without tokens says of a row."""


class DeviceShard:
    """A `Shard`. ids: its tokens. whole: knows what rows change in their logits."""

    def __init__(self, kernels: Kernels, ids: range, rank: int, whole: Sampler) -> None:
        self._kernels, self._ids, self._rank, self._whole = kernels, ids, rank, whole

    def largest_words(self, logits: Tensor, num_rows: int, largest: AnyLargest | None) -> Tensor:
        if largest is None:
            largest = self._largest(logits, num_rows)
        elif not isinstance(largest, DeviceLargest):
            largest = DeviceLargest(*(upload(np.asarray(part), logits.device) for part in largest))
        token_ids = largest.token_ids.to(torch.int32) + self._ids.start
        return torch.stack([token_ids, largest.logits.view(torch.int32)], dim=1).view(-1)

    def say(self, logits: Tensor, asked: RecordedRows, largest: AnyLargest | None) -> OwnWords:
        device = logits.device
        pool = [upload(_CONSTANTS, device), self.largest_words(logits, len(asked.rows), largest)]
        parts = [self._ask(logits, asked, indices) for indices in _in_parts(asked)] if len(self._ids) else []
        words = torch.cat([*pool, *(part.words.view(-1) for part in parts)])
        own = words[upload(_places(asked, parts), device).long()]
        return OwnWords(own, partial(self._draw, asked, parts))

    def _largest(self, logits: Tensor, num_rows: int) -> DeviceLargest:
        if not len(self._ids):
            token_ids = torch.zeros(num_rows, dtype=torch.int64, device=logits.device)
            return DeviceLargest(token_ids, torch.full((num_rows,), -torch.inf, device=logits.device))
        HostLogits(logits).check(num_rows)
        return DeviceLargest(*self._kernels.argmax(logits.float()))

    def _ask(self, logits: Tensor, asked: RecordedRows, indices: Sequence[int]) -> _Part:
        rows, records = [asked.rows[i] for i in indices], [asked.records[i] for i in indices]
        raw = logits[upload(np.array(indices), logits.device)].float()
        first_id, has_changes = self._ids.start, rows[0].changes_logits
        changed = changed_logits(raw, rows, self._whole.counts, first_id) if has_changes else raw
        num_places, num_raw_places = (
            min(len(self._ids), max(getattr(record, name) for record in records))
            for name in ("num_places", "num_raw_places")
        )
        sums = None
        weight_sums = raw_sums = torch.zeros(len(rows), 1, dtype=torch.float64, device=raw.device)
        if any(record.has_weight_sum for record in records):
            temperatures = upload(np.array([row.params.temperature for row in rows]), raw.device)
            weights = shard_weights(changed, temperatures)
            weight_sums = weights.sum(1, keepdim=True)
            if records[0].is_drawn_by_owner:
                uniforms = upload(np.array([row.uniform for row in rows]), raw.device)
                sums = WeightSums.of(changed, weights, temperatures, uniforms)
                weight_sums = sums.by_block[:, -1:]
        if num_raw_places:
            raw_sums = shard_weights(raw, None).sum(1, keepdim=True)
        candidates = self._candidates(changed, num_places if has_changes else max(num_places, num_raw_places))
        raw_candidates = self._candidates(raw, num_raw_places) if has_changes else candidates
        words = [part[:, :num_places] for part in candidates] + [weight_sums.view(torch.int32)]
        words += [part[:, :num_raw_places] for part in raw_candidates] + [raw_sums.view(torch.int32)]
        return _Part(
            indices=indices,
            num_places=num_places,
            num_raw_places=num_raw_places,
            words=torch.cat(words, dim=1),
            sums=sums,
        )

    def _candidates(self, rows: Tensor, num_places: int) -> tuple[Tensor, Tensor]:
        """Ids and logits as words, largest first, equals by id: [num_rows, num_places] each."""
        indices = self._kernels.top_k(rows, num_places)
        return indices.to(torch.int32) + self._ids.start, rows.gather(1, indices).view(torch.int32)

    def _draw(self, asked: RecordedRows, parts: Sequence[_Part], everyones: Tensor) -> Tensor:
        device = everyones.device
        tokens = torch.full((len(asked.rows),), NO_TOKEN, dtype=torch.int32, device=device)
        for part in parts:
            if part.sums is not None:
                starts = upload(np.array([asked.starts[index] for index in part.indices]), device)
                drawn = draw_by_owner(everyones, starts, part.sums, self._rank, self._ids.start)
                tokens[upload(np.array(part.indices), device)] = drawn
        return tokens[upload(np.array(asked.drawn), device)]


def _in_parts(asked: RecordedRows) -> Iterator[list[int]]:
    """Rows that anything is said of but their largest logit."""
    kinds: dict[tuple[bool, bool], list[int]] = {}
    for index, (row, record) in enumerate(zip(asked.rows, asked.records, strict=True)):
        if record.num_words:
            kinds.setdefault((row.changes_logits, record.is_drawn_by_owner), []).append(index)
    for indices in kinds.values():
        yield from (indices[start : start + _MAX_ROWS] for start in range(0, len(indices), _MAX_ROWS))


def _places(asked: RecordedRows, parts: Sequence[_Part]) -> NDArray[np.int32]:
    """Where each word lies among the constants, the largest logits and the parts, laid end to end."""
    places = np.zeros(asked.starts[-1], np.int32)
    places[: asked.starts[0]] = np.arange(asked.starts[0]) + len(_CONSTANTS)
    base = len(_CONSTANTS) + asked.starts[0]
    found = {}
    for part in parts:
        for place, index in enumerate(part.indices):
            found[index] = part, base + place * part.words.shape[1]
        base += part.words.numel()
    for index, record in enumerate(asked.records):
        out = places[asked.starts[index] : asked.starts[index + 1]]
        part, start = found.get(index, (_NOTHING, 0))
        num_places, num_raw_places = part.num_places, part.num_raw_places
        end = 2 * record.num_places
        _place_candidates_(out[:end], start, num_places)
        if record.has_weight_sum:
            _place_sum_(out[end : end + 2], start + 2 * num_places, has_sum=index in found)
            end += 2
        if record.num_raw_candidates:
            start += 2 * num_places + 2
            _place_candidates_(out[end:-2], start, num_raw_places)
            _place_sum_(out[-2:], start + 2 * num_raw_places, has_sum=index in found)
    return places


def _place_candidates_(out: NDArray[np.int32], start: int, num_there: int) -> None:
    """num_there: candidates from start on, ids first; places beyond them are empty."""
    ids, logits = out[: len(out) // 2], out[len(out) // 2 :]
    num_taken = min(len(ids), num_there)
    ids[:num_taken], ids[num_taken:] = start + np.arange(num_taken), 0
    logits[:num_taken], logits[num_taken:] = start + num_there + np.arange(num_taken), 1


def _place_sum_(out: NDArray[np.int32], start: int, *, has_sum: bool) -> None:
    out[:] = (start, start + 1) if has_sum else (2, 2)
