"""Answers as JSON, in OpenAI's shapes."""

from collections.abc import Sequence
from typing import Any

from pydantic_core import to_json

from headrace.engine.outputs import CompletionChunk, CompletionOutput, Logprob, RequestOutput, TokenLogprobs
from headrace.tokenizer import Tokenizer

_LEAST_LOGPROB = -9999.0
"""In place of minus infinity, which JSON cannot say."""


def event(data: Any) -> bytes:
    """One server-sent event."""
    return b"data: " + to_json(data) + b"\n\n"


class EventEncoder:
    """Events that differ in their choices alone; what they share is encoded once.

    has_usage: every event has a `usage`, which is null in all but the last.
    """

    def __init__(self, head: dict[str, Any], *, has_usage: bool) -> None:
        self._head = b"data: " + to_json(head)[:-1] + b',"choices":['
        self._tail = b'],"usage":null}\n\n' if has_usage else b"]}\n\n"

    def choice(self, choice: dict[str, Any]) -> bytes:
        return self._head + to_json(choice) + self._tail

    def usage(self, usage: dict[str, Any]) -> bytes:
        """The last event: no choice, but counts."""
        return self._head + b'],"usage":' + to_json(usage) + b"}\n\n"

    def choice_with_usage(self, choice: dict[str, Any], usage: dict[str, Any]) -> bytes:
        return self._head + to_json(choice) + b'],"usage":' + to_json(usage) + b"}\n\n"


def usage_object(num_prompt_tokens: int, num_completion_tokens: int, num_cached_tokens: int) -> dict[str, Any]:
    return {
        "prompt_tokens": num_prompt_tokens,
        "completion_tokens": num_completion_tokens,
        "total_tokens": num_prompt_tokens + num_completion_tokens,
        "prompt_tokens_details": {"cached_tokens": num_cached_tokens},
    }


def usage_of(outputs: Sequence[RequestOutput]) -> dict[str, Any]:
    """Prompts count once, whatever n is."""
    return usage_object(
        sum(len(output.prompt_token_ids) for output in outputs),
        sum(output.metrics.num_completion_tokens for output in outputs),
        sum(output.metrics.num_cached_tokens for output in outputs),
    )


def chat_logprobs(chunk: CompletionChunk | CompletionOutput, num_top: int) -> dict[str, Any] | None:
    """Chat's shape, with the num_top most likely tokens of each place; None where none were asked for."""
    return None if chunk.logprobs is None else {"content": token_logprobs(chunk, num_top), "refusal": None}


def token_logprobs(chunk: CompletionChunk | CompletionOutput, num_top: int) -> list[dict[str, Any]]:
    """One entry for each token, as chats and responses have them; none where none were asked for."""
    pairs = zip(chunk.token_ids, chunk.logprobs, strict=True) if chunk.logprobs is not None else ()
    return [_chat_entry(token_id, entries, num_top) for token_id, entries in pairs]


def _chat_entry(token_id: int, entries: TokenLogprobs, num_top: int) -> dict[str, Any]:
    most_likely = sorted(entries.values(), key=lambda entry: entry.rank)[:num_top]
    return {**_chat_token(entries[token_id]), "top_logprobs": [_chat_token(entry) for entry in most_likely]}


def _chat_token(entry: Logprob) -> dict[str, Any]:
    token = entry.decoded_token
    return {"token": token, "logprob": _finite(entry.logprob), "bytes": list(token.encode("utf-8", "replace"))}


class CompletionLogprobs:
    """Completions' shape, of one output: offsets go on from chunk to chunk.

    num_logprobs: how many likely tokens are shown beside the chosen one.
    tokenizer: spells a prompt's first token, which has no log probability.
    """

    def __init__(self, num_logprobs: int, tokenizer: Tokenizer | None) -> None:
        self._num_logprobs, self._tokenizer = num_logprobs, tokenizer
        self._offset = 0

    def encode(self, token_ids: Sequence[int], logprobs: Sequence[TokenLogprobs | None]) -> dict[str, Any]:
        """logprobs: None for a prompt's first token, which nothing predicts."""
        shown: dict[str, Any] = {"text_offset": [], "token_logprobs": [], "tokens": [], "top_logprobs": []}
        for token_id, entries in zip(token_ids, logprobs, strict=True):
            entry = None if entries is None else entries[token_id]
            token = self._text(token_id) if entry is None else entry.decoded_token
            shown["text_offset"].append(self._offset)
            shown["tokens"].append(token)
            shown["token_logprobs"].append(None if entry is None else _finite(entry.logprob))
            shown["top_logprobs"].append(None if entries is None else self._top(entries))
            self._offset += len(token)
        return shown

    def _text(self, token_id: int) -> str:
        return "" if self._tokenizer is None else self._tokenizer.decode([token_id])

    def _top(self, entries: TokenLogprobs) -> dict[str, float]:
        """The most likely tokens; the chosen one is among them even if it is not likely, as OpenAI has it."""
        if self._num_logprobs == 0:
            return {}
        return {entry.decoded_token: _finite(entry.logprob) for entry in entries.values()}


def prompt_logprobs_object(rows: Sequence[TokenLogprobs | None] | None) -> list[Any] | None:
    """vLLM's shape: by token id, for each prompt token; None for the first."""
    if rows is None:
        return None
    return [
        None
        if row is None
        else {
            str(token_id): {"logprob": _finite(e.logprob), "rank": e.rank, "decoded_token": e.decoded_token}
            for token_id, e in row.items()
        }
        for row in rows
    ]


def _finite(logprob: float) -> float:
    return max(logprob, _LEAST_LOGPROB)
