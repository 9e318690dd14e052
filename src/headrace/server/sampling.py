"""From the fields of a request to `SamplingParams`."""

from collections.abc import Mapping
from typing import Any

from headrace.config import SamplingParams
from headrace.server.errors import InvalidParameter
from headrace.server.protocol.sampling import SamplingFields
from headrace.server.structured import structured_outputs_of

_PASSED_ON = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "logit_bias",
    "stop",
    "stop_token_ids",
    "include_stop_str_in_output",
    "min_tokens",
    "ignore_eos",
    "skip_special_tokens",
    "n",
    "seed",
    "prompt_logprobs",
)
_RECOMMENDED = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")


def recommended_sampling(generation_config: Mapping[str, Any]) -> dict[str, Any]:
    """What a model's generation_config.json says of sampling; greedy if it says that the model does not sample.

    Where it says nothing OpenAI's defaults hold, which are those of `SamplingParams`.
    """
    found = {name: generation_config[name] for name in _RECOMMENDED if generation_config.get(name) is not None}
    if generation_config.get("do_sample") is False:
        found = {"temperature": 0.0} | {k: v for k, v in found.items() if k == "repetition_penalty"}
    return found


def make_sampling_params(
    request: SamplingFields,
    *,
    recommended: Mapping[str, Any],
    max_tokens: int | None,
    logprobs: int | None,
) -> SamplingParams:
    """
    recommended: see `recommended_sampling`; what the request says comes first.
    max_tokens, logprobs: which the routes spell in different ways.

    Raises:
        RequestError: a value outside its range, or two that exclude each other.
    """
    given = {name: getattr(request, name) for name in _PASSED_ON if getattr(request, name) is not None}
    if given.get("prompt_logprobs") is not None and request.stream:
        raise InvalidParameter("prompt_logprobs", "prompt_logprobs are not streamed; set stream to false")
    if request.stream_options is not None and not request.stream:
        raise InvalidParameter("stream_options", "stream_options are for streams; set stream to true")
    given |= {"max_tokens": max_tokens, "logprobs": logprobs, "structured_outputs": structured_outputs_of(request)}
    return SamplingParams.from_mapping({**recommended, **given})
