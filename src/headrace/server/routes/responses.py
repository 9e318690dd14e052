"""`/v1/responses`: OpenAI's Responses API, of which nothing is stored."""

from collections.abc import AsyncGenerator, Iterable
from contextlib import aclosing
from functools import partial
from typing import Any

from fastapi import APIRouter, Request, Response

from headrace.config import SamplingParams
from headrace.errors import HeadraceError
from headrace.server.clients import EventStream, finish_for
from headrace.server.context import Context, ServerContext, request_id_of
from headrace.server.encoding import event, usage_of
from headrace.server.errors import ClientLeft, InvalidParameter
from headrace.server.generation import encoded, finish_all, json_answer, submit_all, updates_of
from headrace.server.openapi import answers
from headrace.server.prompts import EncodedPrompt, encode_chat, output_room
from headrace.server.protocol.responses import ResponsesRequest
from headrace.server.request_stream import RequestStream
from headrace.server.responses.answer import Answer
from headrace.server.responses.conversation import make_messages
from headrace.server.responses.output import Event
from headrace.server.routes.models import check_model
from headrace.server.sampling import check_stream_options, sampling_params_of
from headrace.server.strict_json import StrictRoute
from headrace.server.tool_plans import tool_plan

router = APIRouter(route_class=StrictRoute)


@router.post("/v1/responses", responses=answers(streams=True))
async def create_response(body: ResponsesRequest, request: Request, context: Context) -> Response:
    """Answer a conversation, given as items."""
    check_model(body.model, context)
    _check_nothing_is_stored(body)
    form = _output_form(body)
    plan = tool_plan(
        context,
        body.tools,
        body.tool_choice,
        body.parallel_tool_calls,
        has_output_form=form is not None,
        is_flat=True,
    )
    if body.include and plan.format is not None:
        raise InvalidParameter(
            "include",
            "include: log probabilities are those of a text, and with tools an answer may be none; leave out one of "
            "them, or set tool_choice to 'none'",
        )
    messages = make_messages(body.input, body.instructions)
    prompt = await encode_chat(context, messages, tools=plan.template_tools, field="input")
    params = plan.apply(_params(body, context, prompt, form))
    answer = Answer(body, f"resp_{request_id_of(request)}", context.model_name, params, plan)
    form_field = "tools" if form is None else "text.format"
    streams = await submit_all(
        request, context, f"resp-{request_id_of(request)}", [prompt], params, form_field=form_field
    )
    if body.stream:
        return EventStream(
            _events(context, params, answer, streams), streams, slow_reader_s=context.config.slow_reader_s
        )
    [output] = await finish_for(request.receive, streams, finish_all(streams))
    return await json_answer(context, params, lambda: answer.whole(output.outputs[0], usage_of([output])))


def _check_nothing_is_stored(body: ResponsesRequest) -> None:
    """A client that leaves `store` out, though OpenAI's default is true, is served: it may not care."""
    if body.store:
        raise InvalidParameter("store", "store: this server stores no responses; set it to false or leave it out")
    if body.previous_response_id is not None:
        raise InvalidParameter(
            "previous_response_id",
            "previous_response_id: this server stores no responses; send the whole conversation as input",
        )


def _output_form(body: ResponsesRequest) -> dict[str, Any] | None:
    """The structured outputs that `text.format` asks for."""
    asked = body.text.format if body.text else None
    if asked is None or asked.type == "text":
        return None
    if asked.type == "json_object":
        return {"json_object": True}
    if asked.name is None or asked.schema_ is None:
        missing = "name" if asked.name is None else "schema"
        raise InvalidParameter(f"text.format.{missing}", f"text.format.{missing} is missing; json_schema needs it")
    return {"json": asked.schema_}


def _params(
    body: ResponsesRequest, context: ServerContext, prompt: EncodedPrompt, form: dict[str, Any] | None
) -> SamplingParams:
    """Without a limit an answer may be as long as the model and the cache allow."""
    check_stream_options(body.stream, body.stream_options)
    asked = body.max_output_tokens
    settled = {
        "max_tokens": output_room(context, [prompt], asked, default=None, param="max_output_tokens"),
        "logprobs": _num_logprobs(body),
        "structured_outputs": form,
    }
    return sampling_params_of(body, context.recommended, settled)


def _num_logprobs(body: ResponsesRequest) -> int | None:
    """How many likely tokens are shown beside each; None shows no log probabilities at all."""
    if body.include:
        return body.top_logprobs or 0
    if body.top_logprobs:
        raise InvalidParameter(
            "top_logprobs", "top_logprobs needs 'message.output_text.logprobs' in include; send it, or leave this out"
        )
    return None


async def _events(
    context: ServerContext, params: SamplingParams, answer: Answer, streams: list[RequestStream]
) -> AsyncGenerator[bytes, None]:
    """Nothing is sent before the engine has answered, so that a request that fails before has its own status."""
    has_begun = False
    try:
        async with aclosing(updates_of(streams)) as updates:
            async for _, update in updates:
                if not has_begun:
                    has_begun = True
                    yield _encode(answer.begin())
                for chunk in update.chunks:
                    if data := _encode(answer.add(chunk)):
                        yield data
                if update.finished is not None:
                    last = answer.finish(update.finished.outputs[0], usage_of([update.finished]))
                    yield await encoded(context, params, partial(_encode, last))
    except ClientLeft:
        raise
    except HeadraceError as error:
        if not has_begun:
            raise
        yield _encode(answer.fail(error))


def _encode(events: Iterable[Event]) -> bytes:
    return b"".join([b"event: " + one["type"].encode() + b"\n" + event(one) for one in events])
