"""Log probabilities of prompts, some rows of logits at a time."""

from collections.abc import Callable, Iterator, Sequence

from torch import Tensor

from headrace.engine.logprobs import prompt_logprobs
from headrace.engine.plan import NewSequence, PromptLogprobs, ScheduledChunk
from headrace.errors import KernelError

PROMPT_LOGITS_ROWS = 64
"""Prompt positions whose logits exist at once: 64 rows of 128 Ki entries are 32 MiB of float32."""


def num_rows_of_parts(chunk: ScheduledChunk, new: NewSequence) -> list[int]:
    """Rows of logits that `score_prompt` asks for at once, in order: it follows from the plan alone."""
    return [len(part) for part in _parts(chunk, new)]


def score_prompt(
    chunk: ScheduledChunk, new: NewSequence, hidden_states: Tensor, whole_logits: Callable[[Tensor], Tensor]
) -> list[PromptLogprobs]:
    """Row i of the chunk scores the prompt token after it; the last prompt token scores none.

    whole_logits: of rows of hidden states, over the whole vocabulary. Ranks exchange something for them, so it is asked
        for all parts, also where one cannot be used.

    Raises:
        KernelError: logits that are no finite numbers.
    """
    num_top = new.params.prompt_logprobs
    assert num_top is not None, "the prompt is not to be scored"
    found: list[PromptLogprobs] = []
    offset, failure = 0, None
    for part in _parts(chunk, new):
        logits = whole_logits(hidden_states[offset : offset + len(part)])
        try:
            rows = prompt_logprobs(logits, part, num_top)
            found.append(PromptLogprobs(seq_id=chunk.seq_id, start=chunk.start + offset + 1, rows=rows))
        except KernelError as error:
            failure = failure or error
        offset += len(part)
    if failure is not None:
        raise failure
    return found


def _parts(chunk: ScheduledChunk, new: NewSequence) -> Iterator[Sequence[int]]:
    targets = new.prompt_token_ids[chunk.start + 1 : chunk.start + chunk.num_tokens + 1]
    return (targets[start : start + PROMPT_LOGITS_ROWS] for start in range(0, len(targets), PROMPT_LOGITS_ROWS))
