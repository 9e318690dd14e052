"""`/v1/completions`."""

from collections.abc import Mapping
from typing import Any

from pydantic import Field

from headrace.config.sampling import MAX_LOGPROBS
from headrace.server.protocol.sampling import Prompts, SamplingFields

MAX_PROMPTS = 128
MAX_CHOICES = 1024
"""Prompts times n. Each has a text, log probabilities and a place in the queue of its own."""


class CompletionRequest(SamplingFields):
    """Continue one prompt or several: texts, or token ids."""

    model: str | None = None
    prompt: Prompts
    max_tokens: int | None = Field(default=None, ge=0, lt=2**31)
    logprobs: int | None = Field(default=None, ge=0, le=MAX_LOGPROBS)
    echo: bool | None = None
    add_special_tokens: bool | None = None

    @classmethod
    def unsupported(cls) -> Mapping[str, tuple[Any, ...]]:
        return {**super().unsupported(), "suffix": ("",)}
