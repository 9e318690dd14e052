"""What one step does, as plain data: small enough to broadcast, complete enough to run on any rank.

A rank keeps the tokens, block table and sampling settings of each live sequence, so a plan carries only what changed.
Nothing here is decided by a rank: whoever holds the same plans in the same order holds the same state.

What is made at every step is a named tuple, which costs a third of a frozen dataclass.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from headrace.config import PoolingParams, SamplingParams


@dataclass(frozen=True, kw_only=True)
class NewSequence:
    """A sequence the ranks have not seen: what they need to run and sample it to its end.

    pooling: how its prompt becomes an embedding; it is then never sampled.
    """

    seq_id: int
    prompt_token_ids: tuple[int, ...]
    params: SamplingParams
    seed: int
    pooling: PoolingParams | None = None


class ScheduledChunk(NamedTuple):
    """Run tokens [start, start + num_tokens) of a sequence.

    new_block_ids: appended to the rank's block table; if `resets_blocks`, the table is emptied first (admission, and
        re-admission after a preemption).
    samples: the chunk reaches the last token of a sequence that generates, so the next one is sampled from its logits.
    """

    seq_id: int
    start: int
    num_tokens: int
    new_block_ids: tuple[int, ...]
    resets_blocks: bool
    samples: bool


class StepPlan(NamedTuple):
    """One step: what the last one sampled, sequences that left and that enter, and chunks in batch order.

    sampled: the last step's (sequence id, token id) of sequences that go on. A rank learns every token from here, so
        that ranks which hold no logits know them too.
    num_decode_tokens: tokens of outputs, run one at a time; the others are prefill: every prompt token computed, and
        whatever a preemption makes compute again.
    masks: (sequence id, allowed tokens) of sequences that this step samples and whose outputs must have a certain form;
        bit i of little-endian 32-bit word j is that of token 32 j + i.
    """

    step: int
    sampled: tuple[tuple[int, int], ...]
    new: tuple[NewSequence, ...]
    finished: tuple[int, ...]
    chunks: tuple[ScheduledChunk, ...]
    num_decode_tokens: int
    masks: tuple[tuple[int, bytes], ...] = ()

    @property
    def num_tokens(self) -> int:
        # Each chunk has a token; most steps are nothing but decodes.
        if self.num_decode_tokens == len(self.chunks):
            return self.num_decode_tokens
        return sum([chunk.num_tokens for chunk in self.chunks])

    @property
    def num_prefill_tokens(self) -> int:
        return self.num_tokens - self.num_decode_tokens


@dataclass(frozen=True, kw_only=True)
class TokenLogprob:
    """Natural-log probability of a token under the raw logits; rank 1 is the most likely."""

    token_id: int
    logprob: float
    rank: int


class SampledToken(NamedTuple):
    """The next token of a sequence; logprobs (the chosen token first, then the most likely) where asked for."""

    seq_id: int
    token_id: int
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, kw_only=True)
class PromptLogprobs:
    """Log probabilities of prompt tokens [start, start + len(rows)), each row with its prompt token first."""

    seq_id: int
    start: int
    rows: tuple[tuple[TokenLogprob, ...], ...]


class Embedding(NamedTuple):
    """Of a prompt that was pooled; values: float32, as they lie in memory."""

    seq_id: int
    values: bytes


class StepResult(NamedTuple):
    """sampled: in the order of their rows. failed: why no token was sampled, or no embedding made, by sequence id."""

    sampled: tuple[SampledToken, ...]
    failed: Mapping[int, str]
    prompt_logprobs: tuple[PromptLogprobs, ...] = ()
    embeddings: tuple[Embedding, ...] = ()
