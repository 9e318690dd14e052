"""Serves thousands of requests and prints by how many bytes that grew this process: `memory_growth.py MODEL`.

A program of its own, since what other tests of the same process leave to the allocator would come and go meanwhile.
Prints the growth over 1000 requests, and over 1000 more during which 4 KiB for each are kept on purpose.
"""

import gc
import json
import sys
from collections.abc import Callable, Iterator
from itertools import count

import numpy as np
import psutil

from headrace import LLM, SamplingParams

NUM_REQUESTS = 1000
NUM_WARM_UP = 300
"""By then every block of the cache, every size of batch and every token's text has been met."""
LEAKED_BYTES = 4096


def varied_requests(vocab_size: int) -> Iterator[tuple[list[int], SamplingParams]]:
    random = np.random.default_rng(0)
    kinds = [
        {},
        {"temperature": 1.0, "seed": 1, "top_k": 5, "n": 2},
        {"logprobs": 3, "repetition_penalty": 1.2},
        {"prompt_logprobs": 1},
        {"stop": ["zzz"], "presence_penalty": 0.5},
    ]
    while True:
        for kind in kinds:
            prompt = random.integers(0, vocab_size, random.integers(1, 80)).tolist()
            yield prompt, SamplingParams(**{"temperature": 0.0, "max_tokens": 6, "ignore_eos": True, **kind})


def make_serve(model: str) -> Callable[[], None]:
    """One request each call: every seventh runs to its end, the others are aborted on their way."""
    engine = LLM(model, num_threads=2, num_blocks=40, max_num_seqs=4, max_num_batched_tokens=64).engine
    requests = varied_requests(engine.model.config.vocab_size)
    numbers = count()

    def serve() -> None:
        number = next(numbers)
        request_id = f"request-{number}"
        engine.add_request(request_id, *next(requests))
        for _ in range(number % 7 or 1000):
            if not engine.has_unfinished:
                return
            engine.step()
        engine.abort(request_id)

    return serve


def growth_bytes(serve: Callable[[], object]) -> int:
    """Private memory that this process takes on over the requests."""
    before = private_bytes()
    for _ in range(NUM_REQUESTS):
        serve()
    return private_bytes() - before


def private_bytes() -> int:
    gc.collect()
    return int(psutil.Process().memory_full_info().uss)


def main() -> None:
    serve = make_serve(sys.argv[1])
    for _ in range(NUM_WARM_UP):
        serve()
    kept = []
    growth = growth_bytes(serve)
    leaking = growth_bytes(lambda: kept.append(bytes(LEAKED_BYTES)) or serve())
    print(json.dumps({"growth_bytes": growth, "leaking_growth_bytes": leaking}))


if __name__ == "__main__":
    main()
