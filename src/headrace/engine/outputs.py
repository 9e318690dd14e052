"""What a caller gets back. Names and shapes are those of vLLM's users.

What is made at every step is no frozen dataclass, which costs three times as much to make.
"""

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from headrace.engine.metrics import RequestMetrics


@dataclass(frozen=True, kw_only=True, slots=True)
class Logprob:
    """Natural-log probability under the raw logits; rank 1 is the most likely token."""

    logprob: float
    rank: int
    decoded_token: str


TokenLogprobs = dict[int, Logprob]
"""By token id: the chosen token and the most likely ones."""


@dataclass(kw_only=True, slots=True)
class CompletionOutput:
    """One generated text.

    finish_reason: "stop", "length", "abort" or "error"; stop_reason: the stop string or stop token id that ended it
    (None for an end-of-sequence token); error: what went wrong, with finish_reason "error".
    """

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    error: str | None = None


@dataclass(kw_only=True)
class RequestOutput:
    """A finished request.

    prompt_logprobs: one entry per prompt token, None for the first.
    embedding: [hidden_size] of a prompt that was pooled; its one output then has no text, and says how it ended.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    metrics: RequestMetrics
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    embedding: NDArray[np.float32] | None = None


@dataclass(slots=True)
class CompletionChunk:
    """What one step added to one output: text that is final, and the tokens sampled.

    The text may lag behind the tokens (half a character, a possible stop string); the last chunk has a finish_reason.
    ttft_s: the request's time to first token, with that token alone.
    itl_s: inter-token latency, from the output's token before this one; None for its first.
    """

    index: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    ttft_s: float | None = None
    itl_s: float | None = None


class RequestUpdate(NamedTuple):
    """News of one request after a step; `finished` is the whole result, with the last update only."""

    request_id: str
    chunks: tuple[CompletionChunk, ...]
    finished: RequestOutput | None = None
