"""A long-lived engine's memory does not grow with the requests it has served."""

import gc
from collections.abc import Callable, Iterator

import numpy as np
import psutil
import pytest
from tiny_model import write_tiny_model

from headrace import LLM, SamplingParams

NUM_REQUESTS = 1000
NUM_WARM_UP = 300
"""By then every block of the cache, every size of batch and every token's text has been met."""
MAX_GROWTH_BYTES = 512 * 2**10
"""Half a KiB a request: less than a prompt's token ids take, and ten times the allocator's own unrest."""


def growth_bytes(serve: Callable[[int], None]) -> int:
    """Private memory that this process took on over the requests after the warm-up."""
    for index in range(NUM_WARM_UP):
        serve(index)
    before = private_bytes()
    for index in range(NUM_WARM_UP, NUM_WARM_UP + NUM_REQUESTS):
        serve(index)
    return private_bytes() - before


def private_bytes() -> int:
    gc.collect()
    return psutil.Process().memory_full_info().uss


@pytest.fixture(scope="module")
def llm(tmp_path_factory) -> LLM:
    model = write_tiny_model(tmp_path_factory.mktemp("models") / "tiny")
    return LLM(str(model), num_threads=2, num_blocks=40, max_num_seqs=4, max_num_batched_tokens=64)


@pytest.fixture
def serve(llm) -> Callable[[int], None]:
    requests = varied_requests(llm.engine.model.config.vocab_size)

    def run(index: int) -> None:
        prompt, params = next(requests)
        request_id = f"request-{index}"
        llm.engine.add_request(request_id, prompt, params)
        for _ in range(index % 7 or 1_000):  # every seventh runs to its end, the others are aborted on their way
            if not llm.engine.has_unfinished:
                return
            llm.engine.step()
        llm.engine.abort(request_id)

    return run


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


def test_a_thousand_requests_leave_nothing_behind(llm, serve) -> None:
    assert growth_bytes(serve) < MAX_GROWTH_BYTES
    assert not llm.engine.has_unfinished
    llm.engine.check_integrity()


def test_a_leak_would_be_seen(llm, serve) -> None:
    """Two KiB a request, such as a long prompt's token ids, are found by the measurement above."""
    kept = []

    def leak(index: int) -> None:
        serve(index)
        kept.append(bytes(2048))

    assert growth_bytes(leak) > MAX_GROWTH_BYTES
