"""Hugging Face transformers on the same weights: op by op with either attention, and compiled over a static cache.

Steps are made in a plain loop, without what `generate` adds to each, and tokens stay on the device: a peer at its best.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from scripts.gpu_check.checkpoint import random_checkpoint
from scripts.gpu_check.context import Context, Time
from scripts.gpu_check.figures import Figure
from scripts.gpu_check.model import BATCH_CONTEXT, check_prompt, logprobs_file

COMPILED = "compiled"
_LOGPROB_TOLERANCE = 0.15
"""Of a logarithm of a probability, in bfloat16 through all layers: its logits are rounded to steps of 1/64."""

_LOGITS_TOLERANCE = 0.05
"""Of the norm of a compiled step's logits, to that of the same model's without a cache; both in bfloat16."""


def name_of(kind: str) -> str:
    """As it stands in tables."""
    return f"transformers {kind}"


def measure(kind: str) -> Callable[[Context], Iterator[Figure]]:
    return partial(_measure, kind)


def _measure(kind: str, context: Context) -> Iterator[Figure]:
    from transformers import AutoModelForCausalLM

    folder = random_checkpoint(context)
    attention = "sdpa" if kind == COMPILED else kind
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=context.dtype, attn_implementation=attention)
    model = model.to(context.device).eval()
    with torch.no_grad():
        if kind == COMPILED:
            yield from _compiled(context, model)
            return
        yield from _agreement(context, model)
        yield from _prefill(context, model, kind)
        cases = [(1, n) for n in context.scale.model_contexts]
        for batch, context_len in cases + [(size, BATCH_CONTEXT) for size in context.scale.model_batches]:
            yield from _decode(context, model, kind, batch, context_len)


def _prefill(context: Context, model: Any, kind: str) -> Iterator[Figure]:
    """The last token's logits alone, as an engine computes them."""
    for num_tokens in context.scale.model_prefill:
        ids = _random_ids(context, model, 1, num_tokens)

        def run(ids: Tensor = ids) -> object:
            return model(input_ids=ids, use_cache=True, logits_to_keep=1).logits.argmax(-1)

        run()
        found = context.time_once(run)
        yield Figure(
            group="prefill",
            labels={"by": name_of(kind), "format": context.scale.formats[0], "tokens": num_tokens},
            seconds=found.best_s,
            slowest_s=found.slowest_s,
            num_tokens=num_tokens,
        )


def _decode(context: Context, model: Any, kind: str, batch: int, context_len: int) -> Iterator[Figure]:
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config)
    ids = _random_ids(context, model, batch, context_len)
    token = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits.argmax(-1)

    def steps() -> None:
        nonlocal token
        for _ in range(context.scale.model_steps):
            token = model(input_ids=token, past_key_values=cache, use_cache=True).logits.argmax(-1)

    steps()
    yield _decode_figure(context, kind, batch, context_len, context.time_once(steps))


def _compiled(context: Context, model: Any) -> Iterator[Figure]:
    """One new token at a time over a cache of fixed length, in CUDA graphs ("reduce-overhead"); from the first context
    alone, since each length is compiled anew."""
    from transformers import StaticCache

    scale = context.scale
    mode = "reduce-overhead" if scale.compile_backend == "inductor" else None
    forward = torch.compile(model.forward, backend=scale.compile_backend, mode=mode)
    context_len = scale.model_contexts[0]
    cache = StaticCache(config=model.config, max_cache_len=context_len + (1 + scale.num_rounds) * scale.model_steps + 2)
    ids = _random_ids(context, model, 1, context_len)
    token = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits.argmax(-1)
    position = torch.full((1, 1), context_len, device=context.device)
    expected = model(input_ids=torch.cat((ids, token), 1), logits_to_keep=1).logits.float()

    def step() -> Tensor:
        logits: Tensor = forward(input_ids=token, position_ids=position, past_key_values=cache, use_cache=True).logits
        token.copy_(logits[:, -1].argmax(-1, keepdim=True))
        position.add_(1)
        return logits

    def steps() -> None:
        for _ in range(scale.model_steps):
            step()

    found = step().float().reshape(expected.shape)
    error = ((found - expected).norm() / expected.norm()).item()
    error = error if error == error else float("inf")
    if error <= _LOGITS_TOLERANCE:
        steps()
        time = context.time_once(steps)
    else:
        time = context.not_timed(name_of(COMPILED), error)
    yield replace(_decode_figure(context, COMPILED, 1, context_len, time), error=error, tolerance=_LOGITS_TOLERANCE)


def _decode_figure(context: Context, kind: str, batch: int, context_len: int, found: Time) -> Figure:
    return Figure(
        group="decode",
        labels={
            "by": name_of(kind),
            "format": context.scale.formats[0],
            "batch": batch,
            "context": context_len,
        },
        seconds=found.best_s / context.scale.model_steps,
        slowest_s=found.slowest_s / context.scale.model_steps,
        num_tokens=batch,
    )


def _agreement(context: Context, model: Any) -> Iterator[Figure]:
    """How far the engine's logarithms of the likeliest tokens' probabilities are from these."""
    file = logprobs_file(random_checkpoint(context))
    if not file.exists():
        context.report("agreement with the engine", "no model was measured before", False)
        return
    ours = {int(token_id): logprob for token_id, logprob in json.loads(file.read_text()).items()}
    ids = torch.tensor([check_prompt(model.config.vocab_size)], device=context.device)
    time = context.time_once(lambda: model(input_ids=ids), num_rounds=1)
    logprobs = model(input_ids=ids).logits[0, -1].float().log_softmax(-1)
    theirs = logprobs[list(ours)].tolist()
    yield Figure(
        group="agreement",
        labels={"with": "transformers"},
        seconds=time.best_s,
        error=max(abs(a - b) for a, b in zip(ours.values(), theirs, strict=True)),
        tolerance=_LOGPROB_TOLERANCE,
    )


def _random_ids(context: Context, model: Any, batch: int, num_tokens: int) -> Tensor:
    return torch.randint(0, model.config.vocab_size, (batch, num_tokens), device=context.device)
