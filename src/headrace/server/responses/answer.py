"""The response object, and one answer on its way into it."""

import time
from collections.abc import Iterator, Mapping
from typing import Any

from headrace.config import SamplingParams
from headrace.engine.outputs import CompletionChunk, CompletionOutput
from headrace.errors import HeadraceError
from headrace.server.encoding import token_logprobs
from headrace.server.protocol.responses import ResponsesRequest
from headrace.server.responses.output import COMPLETED, IN_PROGRESS, INCOMPLETE, Event, OutputItems, exhaust
from headrace.server.tools import ToolDelta, ToolPlan


class Answer:
    """Owns the items and the response's state; numbers its events."""

    def __init__(
        self, request: ResponsesRequest, response_id: str, model_name: str, params: SamplingParams, plan: ToolPlan
    ) -> None:
        self._items = OutputItems()
        self._parser = plan.make_parser()
        self._num_top = params.logprobs or 0
        self._sequence_number = 0
        self._state: dict[str, Any] = {"status": IN_PROGRESS, "error": None, "incomplete_details": None, "usage": None}
        self._head = {
            "id": response_id,
            "object": "response",
            "created_at": int(time.time()),
            "model": model_name,
        }
        self._settings = _settings(request, params)

    def response(self) -> dict[str, Any]:
        """As it is now."""
        return {**self._head, **self._state, "output": self._items.items, **self._settings}

    def begin(self) -> Iterator[Event]:
        for kind in ("response.created", "response.in_progress"):
            yield self._number({"type": kind, "response": {**self.response(), "output": []}})

    def add(self, chunk: CompletionChunk) -> Iterator[Event]:
        yield from map(self._number, self._items.add(self._parse(chunk.text), token_logprobs(chunk, self._num_top)))

    def finish(self, completion: CompletionOutput, usage: Mapping[str, Any]) -> Iterator[Event]:
        """Everything has been added."""
        if self._parser is not None:
            yield from map(self._number, self._items.add(self._parser.finish()))
        is_cut = completion.finish_reason == "length"
        status = INCOMPLETE if is_cut else COMPLETED
        yield from map(self._number, self._items.finish(status))
        details = {"reason": "max_output_tokens"} if is_cut else None
        self._state |= {"status": status, "incomplete_details": details, "usage": _usage(usage)}
        if not is_cut:
            self._state["completed_at"] = int(time.time())
        yield self._number({"type": f"response.{status}", "response": self.response()})

    def fail(self, error: HeadraceError) -> Iterator[Event]:
        """The server cannot go on with it."""
        yield from map(self._number, self._items.finish(INCOMPLETE))
        self._state |= {"status": "failed", "error": {"code": "server_error", "message": str(error)}}
        yield self._number({"type": "response.failed", "response": self.response()})

    def whole(self, completion: CompletionOutput, usage: Mapping[str, Any]) -> dict[str, Any]:
        """The response to a request that is not streamed."""
        exhaust(self._items.add(self._parse(completion.text), token_logprobs(completion, self._num_top)))
        exhaust(self.finish(completion, usage))
        return self.response()

    def _parse(self, text: str) -> ToolDelta:
        if self._parser is not None:
            return self._parser.feed(text)
        return ToolDelta((text,)) if text else ToolDelta()

    def _number(self, event: Event) -> Event:
        self._sequence_number += 1
        return {**event, "sequence_number": self._sequence_number - 1}


def _settings(request: ResponsesRequest, params: SamplingParams) -> dict[str, Any]:
    """What was asked for, with the defaults that came to be used."""
    text_format = request.text.format if request.text else None
    return {
        "instructions": request.instructions,
        "max_output_tokens": request.max_output_tokens,
        "metadata": request.metadata or {},
        "parallel_tool_calls": request.parallel_tool_calls is not False,
        "previous_response_id": None,
        "reasoning": {"effort": None, "summary": None},
        "background": False,
        "service_tier": "default",
        "store": False,
        "temperature": params.temperature,
        "text": {"format": _shown(text_format.model_dump(by_alias=True)) if text_format else {"type": "text"}},
        "tool_choice": request.tool_choice or "auto",
        "tools": [{"strict": False, "parameters": None, **_shown(tool)} for tool in request.tools or ()],
        "top_logprobs": params.logprobs or 0,
        "top_p": params.top_p,
        "truncation": "disabled",
        "user": request.user,
        "safety_identifier": request.safety_identifier,
        "prompt_cache_key": request.prompt_cache_key,
    }


def _shown(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value is not None}


def _usage(usage: Mapping[str, Any]) -> dict[str, Any]:
    """Chat's counts under this API's names."""
    cached = usage["prompt_tokens_details"]["cached_tokens"]
    return {
        "input_tokens": usage["prompt_tokens"],
        "input_tokens_details": {"cached_tokens": cached, "cache_write_tokens": 0},
        "output_tokens": usage["completion_tokens"],
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": usage["total_tokens"],
    }
