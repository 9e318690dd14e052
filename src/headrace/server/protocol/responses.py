"""`/v1/responses`."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field

from headrace.config.sampling import MAX_LOGPROBS
from headrace.server.protocol.base import RequestModel
from headrace.server.protocol.sampling import FAIL_FAST, Metadata, Objects, TokenChoice

MAX_ITEMS = 4096


class TextFormat(RequestModel):
    """type json_schema needs name and schema."""

    type: Literal["text", "json_object", "json_schema"]
    name: str | None = Field(default=None, min_length=1, max_length=64)
    description: str | None = None
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")
    strict: bool | None = None


class TextConfig(RequestModel):
    format: TextFormat | None = None

    @classmethod
    def unsupported(cls) -> Mapping[str, tuple[Any, ...]]:
        return {"verbosity": ("medium",)}


class ResponsesStreamOptions(RequestModel):
    @classmethod
    def unsupported(cls) -> Mapping[str, tuple[Any, ...]]:
        return {"include_obfuscation": (False,)}


class ResponsesRequest(TokenChoice):
    """Answer a conversation, given as items. Nothing is stored: each request carries the whole conversation.

    metadata, user, safety_identifier, prompt_cache_key: for the client's own books; they change no answer.
    """

    model: str | None = None
    input: str | Annotated[list[dict[str, Any]], Field(min_length=1, max_length=MAX_ITEMS, fail_fast=True)]
    instructions: str | None = None
    max_output_tokens: int | None = Field(default=None, ge=1, lt=2**31)
    text: TextConfig | None = None
    tools: Objects | None = None
    tool_choice: Literal["none", "auto", "required"] | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    stream_options: ResponsesStreamOptions | None = None
    include: Annotated[list[Literal["message.output_text.logprobs"]], FAIL_FAST] | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=MAX_LOGPROBS)
    metadata: Metadata | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    store: bool | None = None
    previous_response_id: str | None = None

    @classmethod
    def unsupported(cls) -> Mapping[str, tuple[Any, ...]]:
        return {
            "background": (False,),
            "context_management": ([],),
            "conversation": (),
            "max_tool_calls": (),
            "moderation": (),
            "prompt": (),
            "prompt_cache_options": (),
            "prompt_cache_retention": ("in_memory",),
            "reasoning": ({},),
            "service_tier": ("auto", "default"),
            "truncation": ("disabled",),
        }
