"""`/v1/chat/completions`."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from headrace.config.sampling import MAX_LOGPROBS
from headrace.server.protocol.sampling import Metadata, Objects, SamplingFields

MAX_MESSAGES = 4096


class ChatMessage(BaseModel):
    """One message. What else it has goes to the chat template, which knows what it can use."""

    model_config = ConfigDict(extra="allow", allow_inf_nan=False, strict=True)

    role: str = Field(min_length=1, max_length=64)
    content: str | Objects | None = None


Messages = Annotated[list[ChatMessage], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]


class ChatCompletionRequest(SamplingFields):
    """Answer a conversation.

    user, safety_identifier, prompt_cache_key, metadata: for the client's own books; they change no answer.
    """

    model: str | None = None
    messages: Messages
    max_tokens: int | None = Field(default=None, ge=1, lt=2**31)
    max_completion_tokens: int | None = Field(default=None, ge=1, lt=2**31)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=MAX_LOGPROBS)
    tools: Objects | None = None
    tool_choice: Literal["none", "auto", "required"] | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    metadata: Metadata | None = None

    @classmethod
    def unsupported(cls) -> Mapping[str, tuple[Any, ...]]:
        return {
            **super().unsupported(),
            "audio": (),
            "chat_template": (),
            "documents": ([],),
            "echo": (False,),
            "function_call": ("none",),
            "functions": ([],),
            "modalities": (["text"],),
            "prediction": (),
            "reasoning_effort": (),
            "service_tier": ("auto", "default"),
            "store": (False,),
            "verbosity": (),
            "web_search_options": (),
        }
