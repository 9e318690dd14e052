"""Plans and results as messages between ranks: JSON, by position where something is sent at every step."""

import json
from base64 import b64decode, b64encode
from enum import Enum
from typing import Any

from headrace.config import PoolingParams, SamplingParams
from headrace.engine.plan import (
    Embedding,
    NewSequence,
    PromptLogprobs,
    SampledToken,
    ScheduledChunk,
    StepPlan,
    StepResult,
    TokenLogprob,
)
from headrace.errors import OutOfDeviceMemory

_OUT_OF_MEMORY = b"!"
"""No JSON begins so."""


class Kind(Enum):
    """First byte of what rank 0 says to another rank; all but the end, and plans whose exchanges say whether they
    fitted (`Worker.knows_of_all`), are asked for an answer."""

    PLAN = b"p"
    LEDGER = b"l"
    DIFFERENCES = b"d"
    STATISTICS = b"n"
    START_TRACE = b"s"
    TAKE_TRACE = b"t"
    CLOCK = b"c"
    END = b"e"


def encode_plan(plan: StepPlan) -> bytes:
    new = [
        (n.seq_id, n.prompt_token_ids, n.params.to_mapping(), n.seed, n.pooling and n.pooling.to_mapping())
        for n in plan.new
    ]
    masks = [(seq_id, b64encode(mask).decode()) for seq_id, mask in plan.masks]
    return json.dumps(plan._replace(new=new, masks=masks)).encode()  # type: ignore[arg-type]


def decode_plan(message: bytes) -> StepPlan:
    step, sampled, new, finished, chunks, num_decode_tokens, masks = json.loads(message)
    return StepPlan(
        step=step,
        sampled=tuple([(seq_id, token_id) for seq_id, token_id in sampled]),
        new=tuple([_new_sequence(*fields) for fields in new]),
        finished=tuple(finished),
        chunks=tuple([_chunk(*fields) for fields in chunks]),
        num_decode_tokens=num_decode_tokens,
        masks=tuple([(seq_id, b64decode(mask)) for seq_id, mask in masks]),
    )


def encode_result(result: StepResult) -> bytes:
    prompts = [(p.seq_id, p.start, [_logprobs(row) for row in p.rows]) for p in result.prompt_logprobs]
    sampled = [(token.seq_id, token.token_id, _logprobs(token.logprobs)) for token in result.sampled]
    embeddings = [(e.seq_id, b64encode(e.values).decode()) for e in result.embeddings]
    return json.dumps([sampled, prompts, list(result.failed.items()), embeddings]).encode()


def decode_result(message: bytes) -> StepResult:
    sampled, prompts, failed, embeddings = json.loads(message)
    return StepResult(
        sampled=tuple([SampledToken(seq_id, token_id, _as_logprobs(row)) for seq_id, token_id, row in sampled]),
        prompt_logprobs=tuple(
            [
                PromptLogprobs(seq_id=seq_id, start=start, rows=tuple([_as_logprobs(row) for row in rows]))
                for seq_id, start, rows in prompts
            ]
        ),
        failed=dict(failed),
        embeddings=tuple([Embedding(seq_id, b64decode(values)) for seq_id, values in embeddings]),
    )


def encode_answer(answer: StepResult | OutOfDeviceMemory, *, reports: bool) -> bytes:
    """What a rank says of a plan: what came of it, if it is the rank that reports, or why it did not fit."""
    if isinstance(answer, OutOfDeviceMemory):
        return _OUT_OF_MEMORY + str(answer).encode()
    return encode_result(answer) if reports else b""


def decode_answer(message: bytes) -> StepResult | OutOfDeviceMemory | None:
    """None of a rank that does not report."""
    if message.startswith(_OUT_OF_MEMORY):
        return OutOfDeviceMemory(message.removeprefix(_OUT_OF_MEMORY).decode())
    return decode_result(message) if message else None


def _new_sequence(
    seq_id: int, prompt: list[int], params: dict[str, Any], seed: int, pooling: dict[str, Any] | None
) -> NewSequence:
    return NewSequence(
        seq_id=seq_id,
        prompt_token_ids=tuple(prompt),
        params=SamplingParams.from_mapping(params),
        seed=seed,
        pooling=None if pooling is None else PoolingParams.from_mapping(pooling),
    )


def _chunk(
    seq_id: int, start: int, num_tokens: int, new_block_ids: list[int], resets_blocks: bool, samples: bool
) -> ScheduledChunk:
    return ScheduledChunk(seq_id, start, num_tokens, tuple(new_block_ids), resets_blocks, samples)


def _logprobs(row: tuple[TokenLogprob, ...]) -> list[tuple[int, float, int]]:
    return [(entry.token_id, entry.logprob, entry.rank) for entry in row]


def _as_logprobs(row: list[tuple[int, float, int]]) -> tuple[TokenLogprob, ...]:
    return tuple([TokenLogprob(token_id=i, logprob=logprob, rank=rank) for i, logprob, rank in row])
