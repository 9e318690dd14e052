"""The engine from end to end, beside the time the device needs to read the weights and the cache once."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from headrace import LLM, SamplingParams
from headrace.bench.facts import WeightFacts, weight_facts
from headrace.bench.rounds import RoundRunner
from headrace.costs.memory import kv_token_bytes
from headrace.engine.local_executor import LocalExecutor
from scripts.gpu_check.checkpoint import random_checkpoint
from scripts.gpu_check.context import Context
from scripts.gpu_check.figures import Figure

HEADRACE = "headrace"
BATCH_CONTEXT = 16
"""Tokens of context of each sequence of a batch: few, so that a step's time goes into the weights."""

NUM_LOGPROBS = 20
_CHECK_TOKENS = 16


def measure(weight_format: str) -> Callable[[Context], Iterator[Figure]]:
    return partial(_measure, weight_format)


def check_prompt(vocab_size: int) -> list[int]:
    """The same for every engine."""
    return [(7 + 31 * i * i) % vocab_size for i in range(_CHECK_TOKENS)]


def logprobs_file(folder: Path) -> Path:
    """What the engine made of `check_prompt`, for a peer that comes later to be compared with."""
    return folder / "headrace-logprobs.json"


def load(context: Context, weight_format: str) -> LLM:
    folder, scale = random_checkpoint(context), context.scale
    longest = max(*scale.model_prefill, *scale.model_contexts)
    return LLM(
        folder,
        dtype=str(context.dtype).removeprefix("torch."),
        quantize=None if weight_format == scale.formats[0] else weight_format,
        device=str(context.device),
        max_num_seqs=max([1, *scale.model_batches]),
        max_num_batched_tokens=max(longest, 64),
        max_model_len=longest + 1024,
        kv_cache_bytes=scale.kv_cache_bytes,
        enable_prefix_caching=False,
        num_threads=scale.num_threads,
    )


def _measure(weight_format: str, context: Context) -> Iterator[Figure]:
    llm = load(context, weight_format)
    try:
        if weight_format == context.scale.formats[0]:
            _write_logprobs(llm, random_checkpoint(context))
        yield from _figures(context, llm, weight_format)
    finally:
        llm.close()


def _figures(context: Context, llm: LLM, weight_format: str) -> Iterator[Figure]:
    model, scale, runner = llm.engine.model, context.scale, RoundRunner(llm.engine)
    assert isinstance(model.executor, LocalExecutor)
    decode_step = model.executor.worker.decode_step
    facts = weight_facts(model.config, model.formats, model.kernels)
    token_bytes = kv_token_bytes(model.config, model.kv_cache_format)
    labels = {"by": HEADRACE, "format": weight_format}
    runner.run(1, scale.model_prefill[0], 2)
    for num_tokens in scale.model_prefill:
        runner.run(1, num_tokens, 0)  # compiles, for so many rows
        found = [runner.run(1, num_tokens, 0).prefill_s for _ in range(scale.num_rounds)]
        yield Figure(
            group="prefill",
            labels=labels | {"tokens": num_tokens},
            seconds=min(found),
            slowest_s=max(found),
            num_bytes=facts.bytes_per_step,
            num_ops=_prefill_ops(facts, num_tokens),
            num_tokens=num_tokens,
        )
    cases = [(1, n) for n in scale.model_contexts] + [(size, BATCH_CONTEXT) for size in scale.model_batches]
    for batch, context_len in cases:
        found = []
        with runner.prefilled(batch, context_len, (1 + scale.num_rounds) * scale.model_steps):
            runner.fastest_step_s(scale.model_steps)
            found = [_mean_step_s(context, runner, scale.model_steps) for _ in range(scale.num_rounds)]
        seen = context_len + int((1 + scale.num_rounds / 2) * scale.model_steps)
        yield Figure(
            group="decode",
            labels=labels | {"batch": batch, "context": context_len},
            seconds=min(found),
            slowest_s=max(found),
            num_bytes=facts.bytes_per_step + batch * seen * token_bytes,
            num_ops=2 * batch * (facts.num_layer_parameters + facts.num_head_parameters),
            num_tokens=batch,
            note=decode_step.obstacle or "",
        )


def _mean_step_s(context: Context, runner: RoundRunner, num_steps: int) -> float:
    """The mean, since a host that is ahead of the device in one step pays for it in the next."""
    return context.time_once(lambda: runner.fastest_step_s(num_steps), num_rounds=1).best_s / num_steps


def _prefill_ops(facts: WeightFacts, num_tokens: int) -> int:
    return 2 * (facts.num_layer_parameters * num_tokens + facts.num_head_parameters)


def _write_logprobs(llm: LLM, folder: Path) -> None:
    prompt = check_prompt(llm.engine.model.config.vocab_size)
    params = SamplingParams(temperature=0.0, max_tokens=1, logprobs=NUM_LOGPROBS, ignore_eos=True)
    [output] = llm.generate([{"prompt_token_ids": prompt}], params)
    assert output.outputs[0].logprobs is not None
    [found] = output.outputs[0].logprobs
    logprobs = {str(token_id): entry.logprob for token_id, entry in found.items()}
    logprobs_file(folder).write_text(json.dumps(logprobs))
