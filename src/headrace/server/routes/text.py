"""`/tokenize` and `/detokenize`."""

from collections.abc import Callable
from functools import partial
from typing import Any

from fastapi import APIRouter, Response
from pydantic_core import to_json

from headrace.server.context import Context
from headrace.server.errors import InvalidParameter
from headrace.server.openapi import answers
from headrace.server.prompts import EncodedPrompt, encode_chat, encode_prompts, tokenizer_of
from headrace.server.protocol.text import DetokenizeRequest, TokenizeRequest
from headrace.server.routes.models import check_model
from headrace.server.strict_json import StrictRoute

router = APIRouter(route_class=StrictRoute)


@router.post("/tokenize", responses=answers())
async def tokenize(body: TokenizeRequest, context: Context) -> Response:
    """The tokens that a prompt or a conversation becomes."""
    check_model(body.model, context)
    encoded = await _encode(body, context)
    tokenizer, max_model_len = tokenizer_of(context.model), context.engine.engine.max_num_tokens

    def describe() -> dict[str, Any]:
        ids = encoded.token_ids
        found: dict[str, Any] = {"count": len(ids), "max_model_len": max_model_len, "tokens": ids}
        if body.return_token_strs:
            found["token_strs"] = [tokenizer.id_to_token(token_id) for token_id in ids]
        return found

    return await _answer(describe, context)


@router.post("/detokenize", responses=answers())
async def detokenize(body: DetokenizeRequest, context: Context) -> Response:
    """The text of tokens, special ones included."""
    check_model(body.model, context)
    vocab_size = context.model.config.vocab_size
    outside = next((token_id for token_id in body.tokens if token_id >= vocab_size), None)
    if outside is not None:
        raise InvalidParameter("tokens", f"token {outside} is not in the vocabulary; allowed: 0 to {vocab_size - 1}")
    decode = partial(tokenizer_of(context.model).decode, body.tokens, skip_special_tokens=False)
    return await _answer(lambda: {"prompt": decode()}, context)


async def _answer(describe: Callable[[], dict[str, Any]], context: Context) -> Response:
    """Made and encoded where the loop does not wait for it: there may be millions of tokens."""
    content = await context.text_threads.run(lambda: to_json(describe()))
    return Response(content, media_type="application/json")


async def _encode(body: TokenizeRequest, context: Context) -> EncodedPrompt:
    if (body.prompt is None) == (body.messages is None):
        raise InvalidParameter("prompt", "give either prompt or messages")
    if body.prompt is not None:
        add_special_tokens = body.add_special_tokens is not False
        return (await encode_prompts(context, body.prompt, add_special_tokens=add_special_tokens))[0]
    assert body.messages is not None
    return await encode_chat(
        context,
        [message.model_dump(exclude_unset=True) for message in body.messages],
        tools=body.tools,
        add_generation_prompt=body.add_generation_prompt is not False,
        template_variables=body.chat_template_kwargs,
    )
