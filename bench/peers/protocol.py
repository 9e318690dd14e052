"""What is measured of every engine, the same for all: `headrace bench model` follows it too.

Prefill is one prompt of 512 tokens, decode 48 steps from there. Batched decode is 12 steps of several sequences, each
from a context of 8. Every prompt is new random token ids. Each figure is the best of several rounds.
"""

import argparse
import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

PROMPT_TOKENS, DECODE_STEPS = 512, 48
BATCH_CONTEXT_TOKENS, BATCH_STEPS = 8, 12
BATCH_SIZES = (1, 4, 8, 16, 32)
ROUNDS = 3

_FIRST_ORDINARY_ID = 10
"""Vocabularies begin with special tokens, and one of them could end a sequence."""


class Peer(Protocol):
    """A loaded model. Times are seconds, without those of making a context or a request."""

    engine: str
    version: str
    vocab_size: int

    def sequence(self, prompt: list[int], num_steps: int) -> tuple[float, float]:
        """Run a prompt to the logits of its last token, then decode; the seconds of either."""
        ...

    def batch(self, prompts: list[list[int]], num_steps: int) -> float | None:
        """Run all prompts, then decode them together; the seconds of decoding, None if the engine takes no batches."""
        ...


@dataclass(frozen=True, kw_only=True)
class Request:
    """What the command line asks for. model: a file or folder that the engine's own converter wrote."""

    model: str
    num_threads: int
    batch_sizes: tuple[int, ...]
    num_rounds: int


def run(load: Callable[[Request], Peer]) -> None:
    """Read the command line, load, measure, and print one JSON object on the last line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch-sizes", type=int, nargs="*", default=list(BATCH_SIZES))
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    args = parser.parse_args()
    request = Request(
        model=args.model, num_threads=args.threads, batch_sizes=tuple(args.batch_sizes), num_rounds=args.rounds
    )
    print(json.dumps(measure(load(request), request)), flush=True)


def measure(peer: Peer, request: Request, seed: int = 0) -> dict[str, object]:
    """The report: tokens per second, and what they belong to."""
    prompts = _Prompts(peer.vocab_size, seed)
    peer.sequence(prompts.make(BATCH_CONTEXT_TOKENS), 2)  # what happens on first use only
    times = [peer.sequence(prompts.make(PROMPT_TOKENS), DECODE_STEPS) for _ in range(request.num_rounds)]
    batched = {}
    for size in request.batch_sizes:
        rounds = [
            peer.batch([prompts.make(BATCH_CONTEXT_TOKENS) for _ in range(size)], BATCH_STEPS)
            for _ in range(request.num_rounds)
        ]
        seconds = [time for time in rounds if time is not None]
        if seconds:
            batched[str(size)] = size * BATCH_STEPS / min(seconds)
    return {
        "engine": peer.engine,
        "version": peer.version,
        "model": request.model,
        "threads": request.num_threads,
        "prefill_512": PROMPT_TOKENS / min(prefill for prefill, _ in times),
        "decode_from_512": DECODE_STEPS / min(decode for _, decode in times),
        "batched_decode": batched,
    }


class _Prompts:
    def __init__(self, vocab_size: int, seed: int) -> None:
        self._ids = range(_FIRST_ORDINARY_ID, vocab_size)
        self._random = random.Random(seed)

    def make(self, num_tokens: int) -> list[int]:
        return self._random.choices(self._ids, k=num_tokens)
