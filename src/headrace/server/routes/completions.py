"""`/v1/completions`."""

import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from fastapi import APIRouter, Request, Response

from headrace.config import SamplingParams
from headrace.engine.outputs import CompletionChunk, CompletionOutput, RequestOutput, TokenLogprobs
from headrace.server.clients import DONE, EventStream, finish_for
from headrace.server.context import Context, ServerContext, request_id_of
from headrace.server.encoding import (
    CompletionLogprobs,
    EventEncoder,
    prompt_logprobs_object,
    usage_of,
)
from headrace.server.errors import InvalidParameter
from headrace.server.generation import finish_all, json_answer, submit_all, updates_of
from headrace.server.openapi import answers
from headrace.server.prompts import EncodedPrompt, encode_prompts, output_room
from headrace.server.protocol.completions import MAX_CHOICES, CompletionRequest
from headrace.server.request_stream import RequestStream
from headrace.server.routes.models import check_model
from headrace.server.sampling import make_sampling_params
from headrace.server.strict_json import StrictRoute
from headrace.server.structured import form_field_of
from headrace.server.usage import Usage, UsageOptions

router = APIRouter(route_class=StrictRoute)

_MAX_TOKENS = 16
"""OpenAI's default."""


@router.post("/v1/completions", responses=answers(streams=True))
async def create_completion(body: CompletionRequest, request: Request, context: Context) -> Response:
    """Continue one prompt or several."""
    check_model(body.model, context)
    prompts = await encode_prompts(
        context,
        body.prompt,
        add_special_tokens=body.add_special_tokens is not False,
        truncate_prompt_tokens=body.truncate_prompt_tokens,
    )
    params = _params(body, context, prompts)
    answer = _Completion(body, context, request_id_of(request), prompts, params)
    streams = await submit_all(request, context, answer.id, prompts, params, form_field=form_field_of(body))
    if body.stream:
        return EventStream(answer.events(streams), streams, slow_reader_s=context.config.slow_reader_s)
    outputs = await finish_for(request.receive, streams, finish_all(streams))
    return await json_answer(context, params, partial(answer.whole, outputs))


def _params(body: CompletionRequest, context: ServerContext, prompts: Sequence[EncodedPrompt]) -> SamplingParams:
    if body.echo and body.stream:
        raise InvalidParameter("echo", "echo is not streamed; set stream to false")
    if body.max_tokens == 0 and not body.echo:
        raise InvalidParameter("max_tokens", "max_tokens is 0, which only echo has a use for; ask for 1 and more")
    num_choices = len(prompts) * (body.n or 1)
    if num_choices > MAX_CHOICES:
        raise InvalidParameter(
            "n",
            f"{len(prompts)} prompts with n = {body.n} are {num_choices} outputs; at most {MAX_CHOICES} at once",
        )
    # The engine makes a token of whatever it runs; one that nobody asked for is left out of the answer.
    asked = 1 if body.max_tokens == 0 else body.max_tokens
    params = make_sampling_params(
        body,
        recommended=context.recommended,
        max_tokens=output_room(context, prompts, asked, default=_MAX_TOKENS, param="max_tokens"),
        logprobs=body.logprobs,
    )
    if body.echo and body.logprobs is not None and params.prompt_logprobs is None:
        return SamplingParams.from_mapping(params.to_mapping() | {"prompt_logprobs": body.logprobs})
    return params


class _Completion:
    """One answer: its choices are prompts times n."""

    def __init__(
        self,
        body: CompletionRequest,
        context: ServerContext,
        request_id: str,
        prompts: Sequence[EncodedPrompt],
        params: SamplingParams,
    ) -> None:
        self.id = f"cmpl-{request_id}"
        self._body, self._prompts, self._params = body, prompts, params
        self._model = context.model
        self._head = {
            "id": self.id,
            "object": "text_completion",
            "created": int(time.time()),
            "model": context.model_name,
        }

    def whole(self, outputs: Sequence[RequestOutput]) -> dict[str, Any]:
        if self._body.max_tokens == 0:
            outputs = [_without_outputs(output) for output in outputs]
        choices = [
            self._whole_choice(index, completion, output)
            for index, output in enumerate(outputs)
            for completion in output.outputs
        ]
        return {**self._head, "choices": choices, "usage": usage_of(outputs)}

    async def events(self, streams: Sequence[RequestStream]) -> AsyncGenerator[bytes, None]:
        options = UsageOptions.of(self._body.stream_options)
        encoder = EventEncoder(self._head, has_usage=options.is_wanted)
        usage = Usage(streams)
        shown = [self._logprobs() for _ in range(len(streams) * self._params.n)]
        async for index, update in updates_of(streams):
            usage.add(update)
            for chunk in update.chunks:
                if not chunk.text and chunk.finish_reason is None and chunk.logprobs is None:
                    continue
                place = index * self._params.n + chunk.index
                choice = self._choice(place, chunk, shown[place])
                if options.is_continuous:
                    yield encoder.choice_with_usage(choice, usage.so_far())
                else:
                    yield encoder.choice(choice)
        if options.is_wanted:
            yield encoder.usage(usage.so_far())
        yield DONE

    def _choice(self, place: int, chunk: CompletionChunk, shown: CompletionLogprobs) -> dict[str, Any]:
        choice: dict[str, Any] = {
            "index": place,
            "text": chunk.text,
            "logprobs": None if chunk.logprobs is None else shown.encode(chunk.token_ids, chunk.logprobs),
            "finish_reason": chunk.finish_reason,
            "stop_reason": chunk.stop_reason,
        }
        if self._body.return_token_ids:
            choice["token_ids"] = list(chunk.token_ids)
        return choice

    def _whole_choice(self, index: int, completion: CompletionOutput, output: RequestOutput) -> dict[str, Any]:
        prompt_text = self._prompt_text(index) if self._body.echo else ""
        choice: dict[str, Any] = {
            "index": index * self._params.n + completion.index,
            "text": prompt_text + completion.text,
            "logprobs": self._whole_logprobs(completion, output),
            "finish_reason": completion.finish_reason,
            "stop_reason": completion.stop_reason,
        }
        if self._body.prompt_logprobs is not None:
            choice["prompt_logprobs"] = prompt_logprobs_object(output.prompt_logprobs)
        if self._body.return_token_ids:
            choice |= {"token_ids": completion.token_ids, "prompt_token_ids": output.prompt_token_ids}
        return choice

    def _whole_logprobs(self, completion: CompletionOutput, output: RequestOutput) -> dict[str, Any] | None:
        if completion.logprobs is None:
            return None
        token_ids: list[int] = completion.token_ids
        logprobs: list[TokenLogprobs | None] = [*completion.logprobs]
        if self._body.echo and output.prompt_logprobs is not None:
            token_ids, logprobs = [*output.prompt_token_ids, *token_ids], [*output.prompt_logprobs, *logprobs]
        return self._logprobs().encode(token_ids, logprobs)

    def _logprobs(self) -> CompletionLogprobs:
        return CompletionLogprobs(self._params.logprobs or 0, self._model.tokenizer)

    def _prompt_text(self, index: int) -> str:
        prompt = self._prompts[index]
        if prompt.text is not None:
            return prompt.text
        tokenizer = self._model.tokenizer
        return "" if tokenizer is None else tokenizer.decode(prompt.token_ids)


def _without_outputs(output: RequestOutput) -> RequestOutput:
    """The prompt alone, with its scores."""
    empty = [
        CompletionOutput(index=c.index, logprobs=None if c.logprobs is None else [], finish_reason="length")
        for c in output.outputs
    ]
    return replace(output, outputs=empty, metrics=replace(output.metrics, num_completion_tokens=0))
