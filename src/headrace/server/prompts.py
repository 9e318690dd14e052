"""From what a client sends to token ids, on threads that are made for it."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

from headrace.engine.load import LoadedModel
from headrace.errors import ContextLengthError, RequestError
from headrace.server.context import ServerContext
from headrace.server.errors import InvalidParameter, blaming
from headrace.server.protocol.completions import MAX_PROMPTS
from headrace.tokenizer import Tokenizer


class EncodedPrompt(NamedTuple):
    """text: None where token ids were sent. field: of the request that it came in."""

    token_ids: list[int]
    text: str | None
    field: str


async def encode_prompts(
    context: ServerContext,
    prompt: str | Sequence[str] | Sequence[int] | Sequence[Sequence[int]],
    *,
    add_special_tokens: bool = True,
    truncate_prompt_tokens: int | None = None,
    field: str = "prompt",
    max_prompts: int = MAX_PROMPTS,
) -> list[EncodedPrompt]:
    """One prompt or several: texts, or token ids; truncate_prompt_tokens: of each only so many, the last ones.

    field: that they were sent in.

    Raises:
        RequestError: none, too many, or text for a model without a tokenizer.
    """
    prompts = _as_list(prompt, field)
    if len(prompts) > max_prompts:
        raise InvalidParameter(field, f"{field} is a list of {len(prompts)}; send at most {max_prompts} at once")
    encode = partial(_encode_all, context.model, prompts, field, add_special_tokens, truncate_prompt_tokens)
    return await context.text_threads.run(encode)


async def encode_chat(
    context: ServerContext,
    messages: Sequence[Mapping[str, Any]],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    add_generation_prompt: bool = True,
    template_variables: Mapping[str, Any] | None = None,
    truncate_prompt_tokens: int | None = None,
    field: str = "messages",
) -> EncodedPrompt:
    """A conversation through the model's chat template.

    field: that it was sent in.

    Raises:
        RequestError: the model has no template, or it refuses the messages.
    """
    render = partial(
        _render,
        context.model,
        messages,
        tools,
        add_generation_prompt,
        dict(template_variables or {}),
        truncate_prompt_tokens,
        field,
    )
    with blaming(field):
        return await context.text_threads.run(render)


def output_room(
    context: ServerContext, prompts: Sequence[EncodedPrompt], given: int | None, *, default: int | None, param: str
) -> int:
    """How many tokens an output may have: as many as were asked for; or the default, if there is room for it.

    default: None is as many as the model and the cache allow. param: the field that asks.

    Raises:
        ContextLengthError: more were asked for than there is room for.
    """
    longest = max(len(prompt.token_ids) for prompt in prompts)
    max_num_tokens = context.engine.engine.max_num_tokens
    # A prompt that leaves no room at all is refused for itself.
    room = max(1, max_num_tokens - longest)
    if given is None:
        return room if default is None else min(default, room)
    if given > room and longest < max_num_tokens:
        raise ContextLengthError(
            f"{param} is {given} after a prompt of {longest} tokens, but both together may have {max_num_tokens}; ask "
            f"for at most {room}, or leave {param} out",
            param=param,
        )
    return given


def tokenizer_of(model: LoadedModel) -> Tokenizer:
    """
    Raises:
        RequestError: the model has none.
    """
    if model.tokenizer is None:
        raise RequestError(f"{model.tokenizer_error}; without a tokenizer, send token ids to /v1/completions")
    return model.tokenizer


def _as_list(prompt: Any, field: str) -> list[str | list[int]]:
    if isinstance(prompt, str):
        return [prompt]
    if not prompt:
        raise InvalidParameter(field, f"{field} is empty; send a text, or at least one token id")
    return [list(prompt)] if isinstance(prompt[0], int) else list(prompt)


def _encode_all(
    model: LoadedModel,
    prompts: list[str | list[int]],
    field: str,
    add_special_tokens: bool,
    truncate_prompt_tokens: int | None,
) -> list[EncodedPrompt]:
    encoded = []
    for prompt in prompts:
        if isinstance(prompt, str):
            ids = tokenizer_of(model).encode(prompt, add_special_tokens=add_special_tokens)
            encoded.append(EncodedPrompt(_last(ids, truncate_prompt_tokens), prompt, field))
        else:
            encoded.append(EncodedPrompt(_last(prompt, truncate_prompt_tokens), None, field))
    return encoded


def _render(
    model: LoadedModel,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] | None,
    add_generation_prompt: bool,
    variables: dict[str, Any],
    truncate_prompt_tokens: int | None,
    field: str,
) -> EncodedPrompt:
    tokenizer = tokenizer_of(model)
    assert model.chat_template is not None, "a model with a tokenizer has one, if only to say that it is empty"
    reserved = {"messages", "tools", "documents", "add_generation_prompt"} & variables.keys()
    if reserved:
        raise InvalidParameter("chat_template_kwargs", f"'{min(reserved)}' is a field of its own; send it there")
    text = model.chat_template.render(messages, tools, add_generation_prompt, **variables)
    return EncodedPrompt(_last(tokenizer.encode(text, add_special_tokens=False), truncate_prompt_tokens), text, field)


def _last(token_ids: list[int], count: int | None) -> list[int]:
    return token_ids if count is None else token_ids[-count:]
