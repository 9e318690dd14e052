"""`/v1/chat/completions`."""

import time
from collections.abc import AsyncGenerator, Sequence
from functools import partial
from typing import Any

from fastapi import APIRouter, Request, Response

from headrace.config import SamplingParams
from headrace.engine.outputs import CompletionChunk, CompletionOutput, RequestOutput
from headrace.server.clients import DONE, EventStream, finish_for
from headrace.server.context import Context, ServerContext, request_id_of
from headrace.server.encoding import EventEncoder, chat_logprobs, prompt_logprobs_object, usage_of
from headrace.server.errors import InvalidParameter
from headrace.server.generation import finish_all, json_answer, submit_all, updates_of
from headrace.server.openapi import answers
from headrace.server.prompts import EncodedPrompt, encode_chat, output_room
from headrace.server.protocol.chat import ChatCompletionRequest
from headrace.server.request_stream import RequestStream
from headrace.server.routes.models import check_model
from headrace.server.sampling import make_sampling_params
from headrace.server.strict_json import StrictRoute
from headrace.server.structured import form_field_of, structured_outputs_of
from headrace.server.tool_plans import tool_plan
from headrace.server.tools import ToolPlan, finish_reason, prepare_messages
from headrace.server.usage import Usage, UsageOptions
from headrace.server.voice import Voice, whole_message

router = APIRouter(route_class=StrictRoute)


@router.post("/v1/chat/completions", responses=answers(streams=True))
async def create_chat_completion(body: ChatCompletionRequest, request: Request, context: Context) -> Response:
    """Answer a conversation."""
    check_model(body.model, context)
    form = structured_outputs_of(body)
    plan = tool_plan(context, body.tools, body.tool_choice, body.parallel_tool_calls, has_output_form=form is not None)
    prompt = await encode_chat(
        context,
        prepare_messages([message.model_dump(exclude_unset=True) for message in body.messages]),
        tools=plan.template_tools,
        add_generation_prompt=body.add_generation_prompt is not False,
        template_variables=body.chat_template_kwargs,
        truncate_prompt_tokens=body.truncate_prompt_tokens,
    )
    params = plan.apply(_params(body, context, prompt))
    answer = _ChatCompletion(body, context, request_id_of(request), params, plan)
    streams = await submit_all(request, context, answer.id, [prompt], params, form_field=form_field_of(body) or "tools")
    if body.stream:
        return EventStream(answer.events(streams), streams, slow_reader_s=context.config.slow_reader_s)
    [output] = await finish_for(request.receive, streams, finish_all(streams))
    return await json_answer(context, params, partial(answer.whole, output))


def _params(body: ChatCompletionRequest, context: ServerContext, prompt: EncodedPrompt) -> SamplingParams:
    """Without a limit an answer may be as long as the model and the cache allow."""
    if body.max_tokens is not None and body.max_completion_tokens is not None:
        raise InvalidParameter("max_tokens", "max_tokens is the old name of max_completion_tokens; give one of them")
    if body.top_logprobs is not None and not body.logprobs:
        raise InvalidParameter("top_logprobs", "top_logprobs needs logprobs set to true")
    param = "max_tokens" if body.max_completion_tokens is None else "max_completion_tokens"
    asked = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    return make_sampling_params(
        body,
        recommended=context.recommended,
        max_tokens=output_room(context, [prompt], asked, default=None, param=param),
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
    )


class _ChatCompletion:
    """One answer, of n choices."""

    def __init__(
        self,
        body: ChatCompletionRequest,
        context: ServerContext,
        request_id: str,
        params: SamplingParams,
        plan: ToolPlan,
    ) -> None:
        self.id = f"chatcmpl-{request_id}"
        self._body, self._params, self._plan = body, params, plan
        self._head = {
            "id": self.id,
            "object": "chat.completion.chunk" if body.stream else "chat.completion",
            "created": int(time.time()),
            "model": context.model_name,
        }

    def whole(self, output: RequestOutput) -> dict[str, Any]:
        found: dict[str, Any] = {
            **self._head,
            "choices": [self._whole_choice(completion) for completion in output.outputs],
            "usage": usage_of([output]),
        }
        if self._body.prompt_logprobs is not None:
            found["prompt_logprobs"] = prompt_logprobs_object(output.prompt_logprobs)
        if self._body.return_token_ids:
            found["prompt_token_ids"] = output.prompt_token_ids
        return found

    async def events(self, streams: Sequence[RequestStream]) -> AsyncGenerator[bytes, None]:
        options = UsageOptions.of(self._body.stream_options)
        encoder = EventEncoder(self._head, has_usage=options.is_wanted)
        usage = Usage(streams)
        voices: dict[int, Voice] = {}
        async for _, update in updates_of(streams):
            usage.add(update)
            for chunk in update.chunks:
                voice = voices.get(chunk.index)
                if voice is None:
                    voice = voices[chunk.index] = Voice(self._plan.make_parser())
                    yield encoder.choice(_begin(chunk.index))
                choice = self._choice(chunk, voice)
                if choice is None:
                    continue
                if options.is_continuous:
                    yield encoder.choice_with_usage(choice, usage.so_far())
                else:
                    yield encoder.choice(choice)
        if options.is_wanted:
            yield encoder.usage(usage.so_far())
        yield DONE

    def _choice(self, chunk: CompletionChunk, voice: Voice) -> dict[str, Any] | None:
        """None if the chunk has nothing to say yet."""
        delta = voice.say(chunk.text, is_last=chunk.finish_reason is not None)
        if not delta and chunk.finish_reason is None and chunk.logprobs is None:
            return None
        choice: dict[str, Any] = {
            "index": chunk.index,
            "delta": delta,
            "logprobs": chat_logprobs(chunk, self._params.logprobs or 0),
            "finish_reason": finish_reason(chunk.finish_reason, voice.num_calls),
        }
        if chunk.stop_reason is not None:
            choice["stop_reason"] = chunk.stop_reason
        if self._body.return_token_ids:
            choice["token_ids"] = list(chunk.token_ids)
        return choice

    def _whole_choice(self, completion: CompletionOutput) -> dict[str, Any]:
        message, num_calls = whole_message(completion.text, self._plan.make_parser())
        choice: dict[str, Any] = {
            "index": completion.index,
            "message": message,
            "logprobs": chat_logprobs(completion, self._params.logprobs or 0),
            "finish_reason": finish_reason(completion.finish_reason, num_calls),
            "stop_reason": completion.stop_reason,
        }
        if self._body.return_token_ids:
            choice["token_ids"] = completion.token_ids
        return choice


def _begin(index: int) -> dict[str, Any]:
    return {
        "index": index,
        "delta": {"role": "assistant", "content": ""},
        "logprobs": None,
        "finish_reason": None,
    }
