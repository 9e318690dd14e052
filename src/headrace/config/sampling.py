"""How the next token is chosen, and when a request ends. Names and defaults are vLLM's where it has them."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Self

from headrace.errors import RequestError, nearest_name


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """Settings of one request.

    temperature: 0 is greedy; otherwise logits are divided by it.
    top_k: keep the k most likely tokens; 0 or -1 keeps all.
    top_p: keep the smallest set of most likely tokens whose probabilities sum to at least top_p.
    min_p: drop tokens less likely than min_p times the most likely one.
    repetition_penalty: r > 1 divides positive and multiplies negative logits of tokens seen in prompt or output.
    presence_penalty, frequency_penalty: subtracted once, or once per occurrence, from tokens seen in the output.
    logit_bias: added to the logits of given token ids, in [-100, 100].
    stop: strings that end the output; the text is cut before them unless include_stop_str_in_output.
    max_tokens: None generates up to the model's length.
    min_tokens: no stop token and no stop string ends the output before this many tokens.
    n: independent outputs for one prompt.
    seed: fixes the draws of this request, whatever else is in the batch; None draws a fresh seed.
    logprobs: report the chosen token's log probability and this many most likely tokens; taken from the raw logits.
    prompt_logprobs: the same for each prompt token.

    Raises:
        RequestError: a value outside its range; the message says what is allowed.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    include_stop_str_in_output: bool = False
    max_tokens: int | None = 16
    min_tokens: int = 0
    ignore_eos: bool = False
    n: int = 1
    seed: int | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    skip_special_tokens: bool = True
