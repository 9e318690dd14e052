"""A request's tokens and log probabilities are the same, to the last bit, whatever else the engine does meanwhile.

Log probabilities are compared as floats, not within a tolerance: one different rounding anywhere in the model shows.
"""

from functools import cache
from pathlib import Path

import pytest
import torch
from checkpoints import BY_NAME, HAS_NATIVE

from headrace import LLM, SamplingParams
from headrace.demo_model import demo_model_path
from headrace.engine import runner
from headrace.engine.step_sizes import StepSizes

pytestmark = pytest.mark.skipif(not HAS_NATIVE, reason="the reference kernels promise no such thing")

MAX_TOKENS = 26
FORMATS = {
    "float32": {"dtype": "float32"},
    "bfloat16": {"dtype": "bfloat16"},
    "int8": {"dtype": "bfloat16", "quantize": "int8"},
    "int4": {"dtype": "bfloat16", "quantize": "int4"},
    "float32-int4": {"dtype": "float32", "quantize": "int4"},
}
FAMILIES = ("llama", "gemma2", "opt", "mixtral")

Result = tuple[tuple[int, ...], tuple[float, ...], tuple[float, ...]]
"""Output tokens, their log probabilities, and those of the prompt's tokens."""


def prompts() -> list[dict]:
    """Lengths around a block of 16 tokens and beyond 64, two with the same first 40 tokens; ids of any vocabulary."""
    first = [7 + (i * 13) % 190 for i in range(100)]
    lengths = ((0, 1), (3, 15), (5, 16), (8, 17), (0, 40), (0, 41), (20, 73))
    return [{"prompt_token_ids": first[offset : offset + length]} for offset, length in lengths]


def params(*, scores_prompt: bool) -> SamplingParams:
    # Prompt log probabilities need every position computed, so they are left out where the cache is to be hit.
    return SamplingParams(
        temperature=1.0,
        seed=5,
        max_tokens=MAX_TOKENS,
        ignore_eos=True,
        logprobs=0,
        prompt_logprobs=0 if scores_prompt else None,
    )


def results(llm: LLM, which: list[dict], *, scores_prompt: bool = True) -> list[Result]:
    return [
        (
            tuple(output.outputs[0].token_ids),
            tuple(next(iter(position.values())).logprob for position in output.outputs[0].logprobs),
            tuple(next(iter(p.values())).logprob for p in output.prompt_logprobs or () if p is not None),
        )
        for output in llm.generate(which, params(scores_prompt=scores_prompt))
    ]


def make_llm(folder: Path, **settings) -> LLM:
    return LLM(folder, **{"num_threads": 2, "max_model_len": 100, **settings})


@cache
def alone(folder: Path, weights: str) -> tuple[Result, ...]:
    """Each prompt by itself, in one chunk, with nothing cached."""
    llm = make_llm(folder, enable_prefix_caching=False, **FORMATS[weights])
    return tuple(results(llm, [prompt])[0] for prompt in prompts())


CASES = [("demo", weights) for weights in FORMATS] + [
    (f, weights) for f in FAMILIES for weights in ("bfloat16", "int4")
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    paths = {family: tmp_path_factory.mktemp(family) for family in FAMILIES}
    for family, path in paths.items():
        BY_NAME[family].write(path)
    return {"demo": demo_model_path(), **paths}


@pytest.fixture(params=CASES, ids="-".join)
def case(request) -> tuple[str, str]:
    return request.param


@pytest.fixture
def folder(folders, case) -> Path:
    return folders[case[0]]


@pytest.fixture
def weights(case) -> str:
    return case[1]


def test_in_a_full_batch(folder, weights):
    assert results(make_llm(folder, **FORMATS[weights]), prompts()) == list(alone(folder, weights))


def test_in_chunks_between_the_tokens_of_others(folder, weights):
    """A budget of 9 tokens a step cuts prompts at places that are no multiple of anything."""
    llm = make_llm(folder, max_num_batched_tokens=9, max_num_seqs=5, enable_prefix_caching=False, **FORMATS[weights])
    assert results(llm, prompts()) == list(alone(folder, weights))


def test_after_a_prefix_hit(folder, weights):
    llm = make_llm(folder, **FORMATS[weights])
    expected = [(tokens, logprobs, ()) for tokens, logprobs, _ in alone(folder, weights)]
    assert results(llm, prompts(), scores_prompt=False) == expected
    assert results(llm, prompts(), scores_prompt=False) == expected
    assert llm.engine.metrics().prefix_hit_tokens > 0


def test_after_a_preemption(folder, weights):
    llm = make_llm(folder, num_blocks=9, enable_prefix_caching=False, **FORMATS[weights])
    assert results(llm, prompts()) == list(alone(folder, weights))
    assert llm.engine.metrics().num_preemptions > 0


@pytest.mark.parametrize("num_threads", [1, 3])
def test_on_another_number_of_threads(folder, weights, num_threads):
    llm = make_llm(folder, **{**FORMATS[weights], "num_threads": num_threads})
    assert results(llm, prompts()) == list(alone(folder, weights))


@pytest.mark.parametrize("dataflow", ["gemv", "flat_gemm", "gemm"])
def test_with_every_linear_layer_on_one_implementation(folder, weights, dataflow):
    assert results(make_llm(folder, dataflow=dataflow, **FORMATS[weights]), prompts()) == list(alone(folder, weights))


def test_step_by_step_instead_of_replayed(folder, weights, monkeypatch):
    monkeypatch.setattr(runner, "exact_sizes", lambda: StepSizes(largest=0))
    assert results(make_llm(folder, **FORMATS[weights]), prompts()) == list(alone(folder, weights))


@pytest.mark.parametrize("model", ["demo", "mixtral"])
def test_decode_steps_are_replayed(folders, model):
    """Otherwise the test above compares a thing with itself."""
    llm = make_llm(folders[model])
    results(llm, prompts())
    assert llm.engine.model.executor.worker.decode_step.obstacle is None


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_without_it_results_are_as_good(weights):
    """Where a CPU has two ways to multiply integer weights, prompts go the one that rounds less, as they do with batch
    invariance: against the model in bfloat16, scores are no further off than those of the invariant one."""
    prompt = [{"prompt_token_ids": tokens} for tokens in ([7 + (i * 13) % 190 for i in range(90)],)]
    folder = demo_model_path()

    def scores(**settings) -> torch.Tensor:
        [result] = results(make_llm(folder, enable_prefix_caching=False, **settings), prompt)
        return torch.tensor(result[2])

    exact, invariant = scores(**FORMATS["bfloat16"]), scores(**FORMATS[weights])
    variant = scores(**FORMATS[weights], batch_invariant=False)
    assert (variant - exact).abs().mean() <= 1.1 * (invariant - exact).abs().mean()


def test_the_reason_says_where_it_is_given_up():
    def reason(**settings) -> str:
        choices = make_llm(demo_model_path(), quantize="int4", **settings).engine.model.kernels.choices
        return next(choice.reason for choice in choices if choice.op == "linear")

    cpu = pytest.importorskip("headrace.kernels.cpu")
    assert reason().endswith(f"instruction set {cpu.best_target()}")
    given_up = ", not batch invariant" if cpu.has_float16_tiles(cpu.best_target()) else ""
    assert reason(batch_invariant=False) == reason() + given_up
