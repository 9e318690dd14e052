"""Token counts of a stream."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

from headrace.engine.outputs import RequestUpdate
from headrace.server.encoding import usage_object
from headrace.server.protocol.sampling import StreamOptions
from headrace.server.request_stream import RequestStream


@dataclass(frozen=True, kw_only=True)
class UsageOptions:
    """is_wanted: counts at the end; is_continuous: in every event, too."""

    is_wanted: bool
    is_continuous: bool

    @classmethod
    def of(cls, options: StreamOptions | None) -> Self:
        if options is None or not options.include_usage:
            return cls(is_wanted=False, is_continuous=False)
        return cls(is_wanted=True, is_continuous=options.continuous_usage_stats)


class Usage:
    """What some streams have taken so far; tokens found in the cache are known when a prompt has ended."""

    def __init__(self, streams: Sequence[RequestStream]) -> None:
        self._num_prompt_tokens = sum(stream.num_prompt_tokens for stream in streams)
        self._num_completion_tokens = self._num_cached_tokens = 0

    def add(self, update: RequestUpdate) -> None:
        self._num_completion_tokens += sum([len(chunk.token_ids) for chunk in update.chunks])
        if update.finished is not None:
            self._num_cached_tokens += update.finished.metrics.num_cached_tokens

    def so_far(self) -> dict[str, Any]:
        return usage_object(self._num_prompt_tokens, self._num_completion_tokens, self._num_cached_tokens)
