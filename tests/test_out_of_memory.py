"""A device whose memory runs out in the middle of steps: requests wait or fail, and the engine goes on.

Faults are injected into an op of the reference; what a device's memory would do is in tests/test_gpu_engine.py.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from checkpoints import random_tokens
from tiny_model import write_tiny_model

from headrace import LLM, RequestOutput, SamplingParams
from headrace.engine import load_rank
from headrace.engine.scheduler import _PATIENCE_STEPS
from headrace.kernels import KernelChoice, resolve_kernels

TEXT = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has 1.00 GiB free. More of this."
PROMPTS = [random_tokens(n, seed=n) for n in (7, 5, 9, 6)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("models") / "tiny", with_tokenizer=False)


class Device:
    """fails: whether attention of so many tokens, of so many sequences, finds no memory."""

    def __init__(self) -> None:
        self.fails: Callable[[int, int], bool] = lambda num_tokens, num_seqs: False
        self.num_failures = 0

    def attention(self, query, kv_cache, block_tables, context_lens, cu_seqlens_q, spec):
        if self.fails(len(query), len(context_lens)):
            self.num_failures += 1
            raise torch.OutOfMemoryError(TEXT)
        return self._attention(query, kv_cache, block_tables, context_lens, cu_seqlens_q, spec)

    def kernels(self, *_, **__):
        found = resolve_kernels(KernelChoice.REFERENCE)
        self._attention = found.attention
        return replace(found, attention=self.attention)

    def fail_times(self, count: int) -> None:
        self.fails = lambda *_: self.num_failures < count


@pytest.fixture
def device(monkeypatch) -> Device:
    device = Device()
    monkeypatch.setattr(load_rank, "resolve_kernels", device.kernels)
    return device


def make_llm(folder: Path, **settings) -> LLM:
    llm = LLM(
        str(folder), **({"num_blocks": 40, "block_size": 4, "max_num_batched_tokens": 32, "num_threads": 1} | settings)
    )
    step = llm.engine.step

    def checked():
        updates = step()
        llm.engine.check_integrity()
        assert llm.engine.metrics().num_steps < 500
        return updates

    llm.engine.step = checked
    return llm


def run(llm: LLM, prompts=PROMPTS, **params) -> list[RequestOutput]:
    params = SamplingParams(**({"temperature": 0, "max_tokens": 8, "ignore_eos": True} | params))
    return llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params)


def tokens(outputs: list[RequestOutput]) -> list[list[int]]:
    return [output.outputs[0].token_ids for output in outputs]


@pytest.fixture
def expected(folder, device) -> list[list[int]]:
    return tokens(run(make_llm(folder)))


@pytest.mark.parametrize("count", [1, 2, 3])
def test_memory_that_comes_back_costs_time_alone(folder, device, expected, count) -> None:
    llm = make_llm(folder)
    device.fail_times(count)
    assert tokens(run(llm)) == expected
    assert device.num_failures == count
    assert llm.engine.metrics().num_preemptions == count
    assert tokens(run(llm)) == expected


def test_in_the_middle_of_outputs_nothing_is_lost(folder, device, expected) -> None:
    """Tokens, draws and log probabilities are those of a device with room."""
    params = {"temperature": 1.0, "seed": 5, "logprobs": 2, "max_tokens": 12}
    whole = run(make_llm(folder), **params)
    llm, num_steps = make_llm(folder), 0

    def fails(num_tokens: int, num_seqs: int) -> bool:
        nonlocal num_steps
        num_steps += num_seqs > 1
        return num_seqs > 1 and num_steps % 8 == 7

    device.fails = fails
    again = run(llm, **params)
    assert device.num_failures >= 3
    assert tokens(again) == tokens(whole)
    for one, other in zip(again, whole, strict=True):
        assert [list(row) for row in one.outputs[0].logprobs] == [list(row) for row in other.outputs[0].logprobs]


def test_fewer_run_together_where_all_do_not_fit(folder, device, expected) -> None:
    llm = make_llm(folder)
    device.fails = lambda num_tokens, num_seqs: num_tokens > 10
    assert tokens(run(llm)) == expected
    assert 0 < device.num_failures <= 2 * len(PROMPTS)  # and not at every step


def test_after_some_time_more_run_together_again(folder, device) -> None:
    llm = make_llm(folder)
    device.fail_times(3)
    run(llm, max_tokens=4)
    assert llm.engine._scheduler._max_num_running == 1
    run(llm, PROMPTS[:1], max_tokens=_PATIENCE_STEPS + 1)
    assert llm.engine._scheduler._max_num_running == 2


def test_what_does_not_fit_alone_fails_alone(folder, device, expected) -> None:
    llm = make_llm(folder)
    device.fails = lambda num_tokens, num_seqs: num_tokens > 10
    huge = random_tokens(20, seed=4)
    outputs = run(llm, [PROMPTS[0], huge, *PROMPTS[1:]])
    assert tokens([outputs[0], *outputs[2:]]) == expected
    failed = outputs[1].outputs[0]
    assert (failed.finish_reason, failed.token_ids) == ("error", [])
    assert "a step does not fit the memory of cpu: CUDA out of memory. Tried to allocate 2.00 GiB" in failed.error
    assert "max_num_batched_tokens" in failed.error
    assert tokens(run(llm)) == expected


def test_a_step_of_one_request_is_tried_once_more(folder, device) -> None:
    whole = run(make_llm(folder), PROMPTS[:1])
    llm = make_llm(folder)
    device.fail_times(1)
    assert tokens(run(llm, PROMPTS[:1])) == tokens(whole)
    device.fail_times(3)
    assert run(llm, PROMPTS[:1])[0].outputs[0].finish_reason == "error"
    device.fail_times(4)
    assert tokens(run(llm, PROMPTS[:1])) == tokens(whole)


def test_outputs_of_one_request_wait_for_each_other(folder, device) -> None:
    whole = run(make_llm(folder), PROMPTS[:2], n=3, temperature=1.0, seed=1)
    llm = make_llm(folder)
    device.fails = lambda num_tokens, num_seqs: num_seqs > 1 and device.num_failures < 4
    again = run(llm, PROMPTS[:2], n=3, temperature=1.0, seed=1)
    for one, other in zip(again, whole, strict=True):
        assert [o.token_ids for o in one.outputs] == [o.token_ids for o in other.outputs]


def test_a_request_can_be_aborted_while_it_waits(folder, device) -> None:
    llm = make_llm(folder)
    device.fails = lambda num_tokens, num_seqs: num_tokens > 10
    with llm.stream({"prompt_token_ids": PROMPTS[0]}, SamplingParams(max_tokens=30, ignore_eos=True)) as stream:
        other = llm.stream({"prompt_token_ids": PROMPTS[2]}, SamplingParams(max_tokens=3))
        stream.advance()
        other.close()
        assert not llm.engine._pending
        for _ in stream:
            pass
        assert len(stream.output.outputs[0].token_ids) == 30


@pytest.mark.parametrize("text", ["CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED"])
def test_libraries_that_find_no_memory_count_too(folder, device, expected, text) -> None:
    llm = make_llm(folder)

    def fails(num_tokens: int, num_seqs: int) -> bool:
        if num_seqs > 1 and device.num_failures < 1:
            device.num_failures += 1
            raise RuntimeError(text)
        return False

    device.fails = fails
    assert tokens(run(llm)) == expected
    assert device.num_failures == 1


def test_other_errors_end_all_requests_as_before(folder, device) -> None:
    llm = make_llm(folder)

    def fails(num_tokens: int, num_seqs: int) -> bool:
        raise RuntimeError("something else")

    device.fails = fails
    with pytest.raises(RuntimeError, match="something else"):
        run(llm)
