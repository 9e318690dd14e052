"""From the fields of a request to `SamplingParams`."""

from collections.abc import Mapping
from typing import Any

from headrace.config import SamplingParams
from headrace.server.errors import InvalidParameter
from headrace.server.protocol.base import RequestModel
from headrace.server.protocol.sampling import SamplingFields, TokenChoice
from headrace.server.structured import structured_outputs_of

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
    if request.prompt_logprobs is not None and request.stream:
        raise InvalidParameter("prompt_logprobs", "prompt_logprobs are not streamed; set stream to false")
    check_stream_options(request.stream, request.stream_options)
    form = structured_outputs_of(request)
    settled = {"max_tokens": max_tokens, "logprobs": logprobs, "structured_outputs": form}
    return sampling_params_of(request, recommended, settled)


def sampling_params_of(
    request: TokenChoice, recommended: Mapping[str, Any], settled: Mapping[str, Any]
) -> SamplingParams:
    """
    settled: parameters that are not simply the request's field of the same name.

    Raises: see `make_sampling_params`.
    """
    names = type(request).model_fields.keys() & SamplingParams.__dataclass_fields__.keys() - settled.keys()
    given = {name: value for name in names if (value := getattr(request, name)) is not None}
    return SamplingParams.from_mapping({**recommended, **given, **settled})


def check_stream_options(stream: bool | None, options: RequestModel | None) -> None:
    """
    Raises:
        InvalidParameter: there are options, but no stream.
    """
    if options is not None and not stream:
        raise InvalidParameter("stream_options", "stream_options are for streams; set stream to true")
