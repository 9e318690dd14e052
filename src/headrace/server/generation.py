"""A request's prompts on their way through the engine: all are accepted or none, and all end together."""

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import aclosing
from functools import partial
from typing import Any

from fastapi import Request
from pydantic_core import to_json
from starlette.responses import Response

from headrace.config import PoolingParams, SamplingParams
from headrace.engine.grammar import Grammar
from headrace.engine.outputs import CompletionOutput, RequestOutput, RequestUpdate
from headrace.errors import RequestError
from headrace.server.context import ServerContext
from headrace.server.errors import ServerError, blaming
from headrace.server.holdings import holdings_of
from headrace.server.logprob_memory import logprob_bytes
from headrace.server.prompts import EncodedPrompt
from headrace.server.request_stream import RequestStream


async def submit_all(
    request: Request,
    context: ServerContext,
    request_id: str,
    prompts: Sequence[EncodedPrompt],
    params: SamplingParams | PoolingParams,
    *,
    form_field: str | None = None,
) -> list[RequestStream]:
    """One stream for each prompt. The form that outputs must have is compiled before anything is accepted.

    form_field: of the request, that asks for the form.

    Raises:
        RequestError: one of them can never run.
        Overloaded: they are too many for the queue, or their log probabilities for memory.
        Unavailable: no engine.
    """
    engine = context.engine
    grammar = await _compile(context, params, form_field)
    for prompt in prompts:
        with blaming(prompt.field):
            engine.check(prompt.token_ids, params)
    num_tokens = sum(len(prompt.token_ids) for prompt in prompts)
    num_logprob_bytes = sum(logprob_bytes(len(prompt.token_ids), params) for prompt in prompts)
    admission, now_s = engine.admission, time.monotonic()
    admission.hold_logprobs(num_logprob_bytes, now_s)
    holdings_of(request.scope).callback(admission.release_logprobs, num_logprob_bytes)
    admission.check(params.n * len(prompts), num_tokens, now_s)
    return [engine.submit(request_id, prompt.token_ids, params, prompt.text, grammar) for prompt in prompts]


async def _compile(
    context: ServerContext, params: SamplingParams | PoolingParams, form_field: str | None
) -> Grammar | None:
    """On a thread of its own: within its limits a form may take a second or two."""
    if isinstance(params, PoolingParams) or params.structured_outputs is None:
        return None
    compiler = context.engine.engine.grammar_compiler
    try:
        return await context.grammar_threads.run(partial(compiler.compile, params.structured_outputs))
    except RequestError as error:
        error.param = form_field
        raise


async def finish_all(streams: Sequence[RequestStream]) -> list[RequestOutput]:
    """Whole outputs, in the order of the prompts.

    Raises:
        ServerError: one of them failed; says why.
    """
    outputs = [await stream.finish() for stream in streams]
    for output in outputs:
        for completion in output.outputs:
            check_completion(completion)
    return outputs


async def json_answer(
    context: ServerContext, params: SamplingParams, describe: Callable[[], dict[str, Any]]
) -> Response:
    """What a whole answer is described as."""
    content = await encoded(context, params, lambda: to_json(describe()))
    return Response(content, media_type="application/json")


async def encoded(context: ServerContext, params: SamplingParams, encode: Callable[[], bytes]) -> bytes:
    """A whole answer. With log probabilities it may have millions of entries: it is made where the loop does not wait
    for it."""
    if params.logprobs is None and params.prompt_logprobs is None:
        return encode()
    return await context.text_threads.run(encode)


def check_completion(completion: CompletionOutput) -> None:
    """
    Raises:
        ServerError: the engine could not go on with it.
    """
    if completion.error is not None:
        raise ServerError(completion.error)


async def updates_of(streams: Sequence[RequestStream]) -> AsyncGenerator[tuple[int, RequestUpdate], None]:
    """Updates of all streams as they come, each with the index of its stream.

    Raises:
        ServerError: a stream failed.
    """
    if len(streams) == 1:
        async for update in streams[0]:
            _check(update)
            yield 0, update
        return
    async with aclosing(_merged(streams)) as merged:
        async for index, update in merged:
            _check(update)
            yield index, update


async def _merged(streams: Sequence[RequestStream]) -> AsyncGenerator[tuple[int, RequestUpdate], None]:
    waiting = {asyncio.ensure_future(_next(stream)): index for index, stream in enumerate(streams)}
    try:
        while waiting:
            done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                index = waiting.pop(task)
                update = task.result()
                if update is not None:
                    yield index, update
                    waiting[asyncio.ensure_future(_next(streams[index]))] = index
    finally:
        for task in waiting:
            task.cancel()
        # Several may have failed at once; all are looked at, so that none is reported as forgotten.
        await asyncio.gather(*waiting, return_exceptions=True)


async def _next(stream: AsyncIterator[RequestUpdate]) -> RequestUpdate | None:
    return await anext(stream, None)


def _check(update: RequestUpdate) -> None:
    if update.finished is not None:
        for completion in update.finished.outputs:
            check_completion(completion)
