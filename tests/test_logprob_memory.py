"""What log probabilities are said to take, beside what the interpreter has handed out for them."""

import gc
import tracemalloc

import numpy as np
import pytest

from headrace import PoolingParams, SamplingParams
from headrace.demo_model import demo_model_path
from headrace.engine.output_state import decode_logprobs
from headrace.engine.outputs import TokenLogprobs
from headrace.engine.plan import TokenLogprob
from headrace.server.logprob_memory import logprob_bytes
from headrace.tokenizer import Tokenizer

DEMO = Tokenizer.from_folder(demo_model_path())
RNG = np.random.default_rng(3)


def one_position(num_top: int) -> TokenLogprobs:
    ids = RNG.choice(np.arange(300, DEMO.vocab_size), num_top + 1, replace=False).tolist()
    return decode_logprobs([TokenLogprob(token_id=i, logprob=-i / 7, rank=rank) for rank, i in enumerate(ids)], DEMO)


@pytest.mark.parametrize(("logprobs", "prompt_logprobs"), [(0, None), (1, None), (5, 0), (20, None), (None, 20)])
def test_the_memory_of_log_probabilities(logprobs, prompt_logprobs):
    params = SamplingParams(n=3, max_tokens=50, logprobs=logprobs, prompt_logprobs=prompt_logprobs)
    gc.collect()
    tracemalloc.start()
    try:
        kept = [one_position(logprobs) for _ in range(150)] if logprobs is not None else []
        kept += [one_position(prompt_logprobs) for _ in range(70)] if prompt_logprobs is not None else []
        measured_bytes, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert kept
    assert logprob_bytes(70, params) == pytest.approx(measured_bytes, rel=0.1)


def test_who_asks_for_none_holds_none():
    assert logprob_bytes(1000, SamplingParams(n=3, max_tokens=50)) == 0
    assert logprob_bytes(1000, PoolingParams()) == 0
