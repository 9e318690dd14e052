"""Memory of log probabilities, of which one request may ask for millions: they are kept until it has been answered."""

from headrace.config import PoolingParams, SamplingParams

_POSITION_BYTES = 224
_ENTRY_BYTES = 190
"""Of the mapping that a position has, and of each of its entries: as measured with CPython 3.11, for tokens of a few
letters."""


def logprob_bytes(num_prompt_tokens: int, params: SamplingParams | PoolingParams) -> int:
    """What a prompt's outputs may hold at most, and the prompt itself."""
    if isinstance(params, PoolingParams):
        return 0
    assert params.max_tokens is not None, "a server gives every request a limit"
    of_outputs = params.n * params.max_tokens * _position_bytes(params.logprobs)
    return of_outputs + num_prompt_tokens * _position_bytes(params.prompt_logprobs)


def _position_bytes(num_top: int | None) -> int:
    """The chosen token comes with the num_top most likely ones."""
    return 0 if num_top is None else _POSITION_BYTES + (num_top + 1) * _ENTRY_BYTES
