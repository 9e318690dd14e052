"""`/v1/embeddings`."""

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field

from headrace.server.protocol.base import RequestModel
from headrace.server.protocol.sampling import Prompts

MAX_INPUTS = 2048
"""OpenAI's limit."""


class EmbeddingRequest(RequestModel):
    """One vector for each input: texts, or token ids.

    pooling, normalize: as `PoolingParams` has them.
    """

    model: str | None = None
    input: Prompts
    encoding_format: Literal["float", "base64"] | None = None
    user: str | None = None
    pooling: Literal["last", "mean"] | None = None
    normalize: bool | None = None
    add_special_tokens: bool | None = None
    truncate_prompt_tokens: int | None = Field(default=None, ge=1, lt=2**31)

    @classmethod
    def unsupported(cls) -> Mapping[str, tuple[Any, ...]]:
        return {"dimensions": ()}
