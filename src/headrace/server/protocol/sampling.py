"""How tokens are chosen: OpenAI's fields, and those that vLLM's users send beside them."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field
from pydantic_core import PydanticCustomError

from headrace.config.sampling import MAX_LOGPROBS, MAX_OUTPUTS
from headrace.server.protocol.base import RequestModel

MAX_STOP_STRINGS = 64
MAX_BIASES = 4096
MAX_METADATA = 16
INT64 = 2**63

Stop = Annotated[str, Field(min_length=1)]
Stops = Stop | Annotated[list[Stop], Field(max_length=MAX_STOP_STRINGS, fail_fast=True)]
TokenId = Annotated[int, Field(ge=0, lt=2**31, strict=True)]

FAIL_FAST = Field(fail_fast=True)
"""For lists that may be long: the first item at fault refuses them. An error costs far more than its item."""


def _refuse_large(given: Any) -> Any:
    """Of a mapping every item would be an error of its own."""
    if isinstance(given, dict) and len(given) > MAX_BIASES:
        raise PydanticCustomError("too_long", "Dictionary should have at most {limit} items", {"limit": MAX_BIASES})
    return given


SMALL = BeforeValidator(_refuse_large)

Metadata = Annotated[dict[str, str], Field(max_length=MAX_METADATA), SMALL]

Strings = Annotated[list[str], FAIL_FAST]
TokenIds = Annotated[list[TokenId], FAIL_FAST]
Objects = Annotated[list[dict[str, Any]], FAIL_FAST]
Prompts = str | Strings | TokenIds | Annotated[list[TokenIds], FAIL_FAST]
"""Texts, or token ids."""


class StreamOptions(RequestModel):
    """include_usage: one more event with the counts of all tokens; continuous_usage_stats: counts in every event."""

    include_usage: bool = False
    continuous_usage_stats: bool = False


class JsonSchemaFormat(RequestModel):
    """strict: outputs always follow the schema here, so that either value will do."""

    name: str = Field(min_length=1, max_length=64)
    description: str | None = None
    schema_: dict[str, Any] | bool | None = Field(default=None, alias="schema")
    strict: bool | None = None


class ResponseFormat(RequestModel):
    """type json_schema needs json_schema."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None


class StructuredOutputsField(RequestModel):
    """vLLM's `structured_outputs`: one of them."""

    json_: dict[str, Any] | str | None = Field(default=None, alias="json")
    regex: str | None = None
    choice: Strings | None = None
    grammar: str | None = None
    json_object: bool | None = None


class TokenChoice(RequestModel):
    """How tokens are chosen, whichever way they are asked for. Defaults are what the model's generation_config.json
    recommends, else OpenAI's."""

    temperature: float | None = Field(default=None, ge=0, le=100)
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: int | None = Field(default=None, ge=-1, lt=2**31)
    min_p: float | None = Field(default=None, ge=0, le=1)
    repetition_penalty: float | None = Field(default=None, gt=0, le=1e6)
    presence_penalty: float | None = Field(default=None, ge=-2, le=2)
    frequency_penalty: float | None = Field(default=None, ge=-2, le=2)
    seed: int | None = Field(default=None, ge=-INT64, lt=INT64)
    stop: Stops | None = None
    min_tokens: int | None = Field(default=None, ge=0, lt=2**31)
    ignore_eos: bool | None = None
    stream: bool | None = None
    user: str | None = None


class SamplingFields(TokenChoice):
    """What completions and chats have in common."""

    logit_bias: Annotated[dict[str, Annotated[float, Field(ge=-100, le=100)]], SMALL] | None = Field(
        default=None, max_length=MAX_BIASES
    )
    stop_token_ids: list[TokenId] | None = Field(default=None, max_length=4096)
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    n: int | None = Field(default=None, ge=1, le=MAX_OUTPUTS)
    prompt_logprobs: int | None = Field(default=None, ge=0, le=MAX_LOGPROBS)
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputsField | None = None
    guided_json: dict[str, Any] | str | None = None
    guided_regex: str | None = None
    guided_choice: Strings | None = None
    guided_grammar: str | None = None
    stream_options: StreamOptions | None = None
    truncate_prompt_tokens: int | None = Field(default=None, ge=1, lt=2**31)
    return_token_ids: bool | None = None

    @classmethod
    def unsupported(cls) -> Mapping[str, tuple[Any, ...]]:
        return {
            "best_of": (1,),
            "length_penalty": (1.0,),
            "spaces_between_special_tokens": (True,),
            "use_beam_search": (False,),
        }
