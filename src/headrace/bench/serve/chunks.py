"""What a streamed answer of OpenAI's API says, chunk by chunk."""

import json
from typing import Any

from headrace.bench.serve.http_client import EndAwaited
from headrace.bench.serve.records import Failure, FailureKind, RequestRecord
from headrace.bench.serve.sse import EventTooLong, SseParser

_DONE = b"[DONE]"
_TEXT_FIELDS = ("content", "reasoning_content", "reasoning", "refusal", "tool_calls")
_MAX_ERROR_BYTES = 64 << 10
_MAX_REASON_CHARACTERS = 200


class Malformed(Exception):
    """No answer of OpenAI's API; says what it was instead."""


class StreamedAnswer(EndAwaited):
    """Fills a record from the answer to one request of /v1/completions or /v1/chat/completions with `stream`.

    A chunk counts as output if it brings text, reasoning, a tool call or token ids: the first chunk of a chat, which
    only names the role, does not. It is a failure if the answer stops with neither a finish reason nor [DONE].
    """

    def __init__(self, record: RequestRecord) -> None:
        self._record = record
        super().__init__()

    def start_over(self) -> None:
        super().start_over()
        self._status = 0
        self._events = SseParser()
        self._error_body = bytearray()
        self._is_stream = self._is_done = False

    def on_head(self, status: int, headers: dict[bytes, bytes]) -> None:
        self._status = status
        kind = headers.get(b"content-type", b"").split(b";")[0].strip().lower()
        self._is_stream = status == 200 and kind == b"text/event-stream"
        if status == 200 and not self._is_stream:
            self._fail(FailureKind.MALFORMED, f"the answer is {kind.decode('latin-1') or 'untyped'}, no event stream")

    def on_body(self, piece: bytes, now_s: float) -> None:
        if self._is_stream:
            self._read(self._events.feed, piece, now_s)
        elif len(self._error_body) < _MAX_ERROR_BYTES:
            self._error_body += piece

    def on_end(self, failure: Failure | None, now_s: float) -> None:
        if failure is None and self._status != 200:
            self._fail(FailureKind.STATUS, error_message(bytes(self._error_body)))
        if failure is None and self._is_stream:
            self._read(lambda _: self._events.end(), b"", now_s)
            if not self._is_done and self._record.finish_reason is None:
                self._fail(FailureKind.DISCONNECT, "the stream ended without a finish reason or [DONE]")
        self._record.ended_s = now_s
        super().on_end(failure, now_s)
        self._record.failure = self.failure

    def _read(self, parse: Any, piece: bytes, now_s: float) -> None:
        if self.failure is not None:
            return
        try:
            for event in parse(piece):
                self._take(event, now_s)
        except (Malformed, EventTooLong) as error:
            self._fail(FailureKind.MALFORMED, str(error))

    def _take(self, event: bytes, now_s: float) -> None:
        if event == _DONE:
            self._is_done = True
            return
        chunk = parse_object(event)
        if chunk.get("error") is not None:
            self._fail(FailureKind.STREAM_ERROR, error_message(event))
            return
        if isinstance(usage := chunk.get("usage"), dict):
            self._take_usage(usage)
        for choice in _list(chunk, "choices"):
            if not isinstance(choice, dict):
                raise Malformed(f"a choice is {choice!r:.80}")
            if _has_output(choice):
                self._record.chunk_s.append(now_s)
            if choice.get("finish_reason"):
                self._record.finish_reason = str(choice["finish_reason"])

    def _take_usage(self, usage: dict[str, Any]) -> None:
        self._record.prompt_tokens = _count(usage, "prompt_tokens")
        self._record.output_tokens = _count(usage, "completion_tokens")
        details = usage.get("prompt_tokens_details")
        if isinstance(details, dict):
            self._record.cached_tokens = _count(details, "cached_tokens")

    def _fail(self, kind: FailureKind, reason: str) -> None:
        status = self._status if kind is FailureKind.STATUS else None
        self.failure = self.failure or Failure(kind, reason[:_MAX_REASON_CHARACTERS], status)


def parse_object(data: bytes) -> dict[str, Any]:
    """
    Raises:
        Malformed: no JSON, or something else than an object.
    """
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        raise Malformed(f"no JSON: {data[:80]!r}") from None
    if not isinstance(value, dict):
        raise Malformed(f"{value!r:.80} in place of an object")
    return value


def error_message(body: bytes) -> str:
    """The message of OpenAI's error object, or the beginning of whatever there is."""
    try:
        error = parse_object(body).get("error")
    except Malformed:
        return " ".join(body.decode("utf-8", "replace").split())[:_MAX_REASON_CHARACTERS]
    message = error.get("message") if isinstance(error, dict) else error
    return str(message if message is not None else body.decode("utf-8", "replace"))[:_MAX_REASON_CHARACTERS]


def _has_output(choice: dict[str, Any]) -> bool:
    if choice.get("text") or choice.get("token_ids"):
        return True
    delta = choice.get("delta")
    return isinstance(delta, dict) and any(delta.get(name) for name in _TEXT_FIELDS)


def _list(chunk: dict[str, Any], name: str) -> list[Any]:
    value = chunk.get(name)
    if value is None:
        return []
    if not isinstance(value, list):
        raise Malformed(f"{name} is {value!r:.80}")
    return value


def _count(usage: dict[str, Any], name: str) -> int | None:
    value = usage.get(name)
    if value is None:
        return None
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise Malformed(f"{name} is {value!r:.80}")
    return value
