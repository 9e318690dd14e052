"""`/tokenize` and `/detokenize`, as vLLM has them."""

from typing import Any

from pydantic import Field

from headrace.server.protocol.base import RequestModel
from headrace.server.protocol.chat import Messages
from headrace.server.protocol.sampling import Objects, TokenIds

MAX_TOKENS = 2**20
"""To be made text at once."""


class TokenizeRequest(RequestModel):
    """A text (`prompt`) or a conversation (`messages`)."""

    model: str | None = None
    prompt: str | None = None
    messages: Messages | None = None
    tools: Objects | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    return_token_strs: bool | None = None


class DetokenizeRequest(RequestModel):
    model: str | None = None
    tokens: TokenIds = Field(max_length=MAX_TOKENS)
