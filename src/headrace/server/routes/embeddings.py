"""`/v1/embeddings`: pooled hidden states of prompts."""

import sys
from base64 import b64encode
from collections.abc import Sequence
from functools import partial
from typing import Any

from fastapi import APIRouter, Request, Response
from pydantic_core import to_json

from headrace.config import PoolingParams
from headrace.engine.outputs import RequestOutput
from headrace.server.clients import finish_for
from headrace.server.context import Context, request_id_of
from headrace.server.generation import finish_all, submit_all
from headrace.server.openapi import answers
from headrace.server.prompts import encode_prompts
from headrace.server.protocol.embeddings import MAX_INPUTS, EmbeddingRequest
from headrace.server.routes.models import check_model
from headrace.server.strict_json import StrictRoute

router = APIRouter(route_class=StrictRoute)


@router.post("/v1/embeddings", responses=answers())
async def create_embeddings(body: EmbeddingRequest, request: Request, context: Context) -> Response:
    """Make one vector of each input."""
    check_model(body.model, context)
    prompts = await encode_prompts(
        context,
        body.input,
        add_special_tokens=body.add_special_tokens is not False,
        truncate_prompt_tokens=body.truncate_prompt_tokens,
        field="input",
        max_prompts=MAX_INPUTS,
    )
    params = _params(body)
    streams = await submit_all(request, context, f"embd-{request_id_of(request)}", prompts, params)
    outputs = await finish_for(request.receive, streams, finish_all(streams))
    encode = partial(_encode, outputs, context.model_name, is_base64=body.encoding_format == "base64")
    # Millions of numbers, if many vectors are asked for at once.
    content = await context.text_threads.run(encode)
    return Response(content, media_type="application/json")


def _params(body: EmbeddingRequest) -> PoolingParams:
    given = {name: getattr(body, name) for name in ("pooling", "normalize")}
    return PoolingParams.from_mapping({name: value for name, value in given.items() if value is not None})


def _encode(outputs: Sequence[RequestOutput], model_name: str, *, is_base64: bool) -> bytes:
    num_tokens = sum(len(output.prompt_token_ids) for output in outputs)
    data = [
        {"object": "embedding", "index": index, "embedding": _vector(output, is_base64)}
        for index, output in enumerate(outputs)
    ]
    usage = {"prompt_tokens": num_tokens, "total_tokens": num_tokens}
    return to_json({"object": "list", "data": data, "model": model_name, "usage": usage})


def _vector(output: RequestOutput, is_base64: bool) -> Any:
    """Numbers, or base64 of float32, least significant byte first."""
    assert output.embedding is not None, "whatever is pooled without an error has one"
    if not is_base64:
        return output.embedding.tolist()
    values = output.embedding if sys.byteorder == "little" else output.embedding.byteswap()
    return b64encode(values.tobytes()).decode()
