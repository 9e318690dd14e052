"""What is asked of an engine: the checks of a request that need no scheduler, and the sequences that it becomes."""

import secrets
from collections.abc import Iterable, Iterator
from dataclasses import replace
from operator import index
from typing import SupportsIndex

from headrace.config import PoolingParams, SamplingParams
from headrace.engine.sequence import Sequence
from headrace.errors import RequestError

NO_SAMPLING = SamplingParams()
"""Of requests that nothing is sampled for."""

_SEED_STRIDE = 0x9E3779B97F4A7C15
"""Golden ratio times 2^64: outputs of one request get seeds far apart, and other seeds' outputs miss them."""


def checked_token_ids(
    values: Iterable[SupportsIndex], params: SamplingParams, vocab_size: int, *, has_tokenizer: bool
) -> tuple[int, ...]:
    """Plain ints of any integers, numpy's included; true and false are none.

    Raises:
        RequestError: not integers, or outside the vocabulary, as those that params names may be; or stop strings
            without a tokenizer.
    """
    token_ids = _as_token_ids(values)
    outside = [token_id for token_id in token_ids if not 0 <= token_id < vocab_size]
    if outside:
        raise RequestError(f"prompt token {outside[0]} is not in the vocabulary; allowed: 0 to {vocab_size - 1}")
    if params.stop and not has_tokenizer:
        message = "stop strings need a tokenizer, and this model folder has none; use stop_token_ids"
        raise RequestError(message, param="stop")
    params.check_against_vocab(vocab_size)
    return token_ids


def make_sequences(
    request_id: str, token_ids: tuple[int, ...], params: SamplingParams, seq_ids: Iterator[int]
) -> list[Sequence]:
    """One for each output. seq_ids: never used before."""
    seed = secrets.randbits(64) if params.seed is None else params.seed
    # What is compiled stays here; ranks get a mask at every step.
    params = replace(params, structured_outputs=None) if params.structured_outputs is not None else params
    # One output scores the prompt for all: the others can share its blocks.
    sibling_params = replace(params, prompt_logprobs=None) if params.prompt_logprobs is not None else params
    sequences: list[Sequence] = []
    for output_index in range(params.n):
        sequences.append(
            Sequence(
                seq_id=next(seq_ids),
                request_id=request_id,
                prompt_token_ids=token_ids,
                params=sibling_params if sequences else params,
                seed=(seed + output_index * _SEED_STRIDE) % 2**64,
                forked_from=sequences[0] if sequences else None,
            )
        )
    return sequences


def make_pooling_sequence(
    request_id: str, token_ids: tuple[int, ...], params: PoolingParams, seq_ids: Iterator[int]
) -> Sequence:
    return Sequence(
        seq_id=next(seq_ids),
        request_id=request_id,
        prompt_token_ids=token_ids,
        params=NO_SAMPLING,
        seed=0,
        pooling=params,
    )


def _as_token_ids(values: Iterable[SupportsIndex]) -> tuple[int, ...]:
    if isinstance(values, str | bytes) or not isinstance(values, Iterable):
        raise RequestError(f"prompt_token_ids is {values!r:.80}; give a list of integers")
    values = list(values)
    for value in values:
        if isinstance(value, bool) or not hasattr(value, "__index__"):
            raise RequestError(f"prompt token {value!r:.80} is not in the vocabulary; token ids are integers")
    return tuple(index(value) for value in values)
