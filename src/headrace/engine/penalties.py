"""What a request changes in its logits before a token is drawn: tokens that its form does not allow, bias, tokens
forbidden for now, penalties.

Logits may be those of a shard of the vocabulary, whose first token is first_id; tokens of other shards are left alone.
"""

from array import array
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from headrace.config import SamplingParams
from headrace.engine.draw import Ids, Row


class TokenCounts:
    """How often each token occurs in one sequence's output, kept up to date as the output grows.

    Owns a table of the tokens seen. Knows of the sequence only the two token lists, which may be appended to and not
    changed otherwise. With `counts_prompt`, prompt tokens are in the table too, with their count in the output.
    """

    def __init__(self, prompt: Sequence[int], output: Sequence[int], counts_prompt: bool) -> None:
        self._prompt = prompt
        self._output = output
        self._num_read = 0
        self._place: dict[int, int] = {}
        self._token_ids = array("q")
        self._counts = array("q")
        if counts_prompt:
            self._add(prompt, 0)

    def follows(self, prompt: Sequence[int], output: Sequence[int]) -> bool:
        """Whether these are the very lists that were counted, so that only what was appended is to be read."""
        return prompt is self._prompt and output is self._output and len(output) >= self._num_read

    def read(self) -> tuple[Ids, Ids]:
        """Distinct token ids in order of first occurrence, and their counts in the output."""
        self._add(self._output[self._num_read :], 1)
        self._num_read = len(self._output)
        return np.array(self._token_ids, np.int64), np.array(self._counts, np.int64)

    def _add(self, token_ids: Iterable[int], occurrences: int) -> None:
        for token_id in token_ids:
            place = self._place.setdefault(token_id, len(self._place))
            if place == len(self._token_ids):
                self._token_ids.append(token_id)
                self._counts.append(0)
            self._counts[place] += occurrences


def add_bias_(logits: Row, bias: Mapping[int, float], first_id: int = 0) -> None:
    token_ids = np.fromiter(bias.keys(), np.int64, len(bias)) - first_id
    is_inside = _is_inside(token_ids, logits)
    logits[token_ids[is_inside]] += np.fromiter(bias.values(), np.float32, len(bias))[is_inside]


def allow_only_(logits: Row, mask: bytes, first_id: int = 0) -> None:
    """mask: see `StepPlan.masks`."""
    bits = np.unpackbits(np.frombuffer(mask, np.uint8), bitorder="little")
    logits[bits[first_id : first_id + len(logits)] == 0] = -np.inf


def forbid_(logits: Row, token_ids: Iterable[int], first_id: int = 0) -> None:
    """A model's end-of-sequence id may lie beyond the logits; it cannot be drawn in any case."""
    stop = first_id + len(logits)
    logits[[token_id - first_id for token_id in token_ids if first_id <= token_id < stop]] = -np.inf


def penalize_(logits: Row, params: SamplingParams, counts: TokenCounts, first_id: int = 0) -> None:
    """Make tokens that occurred less likely.

    logit <- logit / r if logit > 0 else logit * r              tokens of prompt or output, r = repetition_penalty
    logit <- logit - frequency_penalty * count - presence_penalty * (count > 0)         count: in the output

    Computed in float64 and rounded once, so that no penalty is itself lost to float32's range.

    Source: repetition, CTRL (arXiv:1909.05858); frequency and presence, the OpenAI API; order and sets as in vLLM.
    """
    token_ids, occurrences = counts.read()
    is_inside = _is_inside(token_ids - first_id, logits)
    token_ids, occurrences = token_ids[is_inside] - first_id, occurrences[is_inside]
    seen = logits[token_ids].astype(np.float64)
    with np.errstate(over="ignore"):  # the caller's check reports a logit grown to +inf
        seen = np.where(seen > 0, seen / params.repetition_penalty, seen * params.repetition_penalty)
        seen -= params.frequency_penalty * occurrences + params.presence_penalty * (occurrences > 0)
        logits[token_ids] = seen


def _is_inside(indices: Ids, logits: Row) -> NDArray[np.bool_]:
    return (indices >= 0) & (indices < len(logits))
