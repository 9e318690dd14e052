"""Whole models on a GPU against the same on the CPU."""

import gc
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from checkpoints import RECIPES, random_tokens

from headrace import LLM, RequestOutput, SamplingParams
from headrace.errors import ConfigError, OutOfDeviceMemory

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
    pytest.mark.timeout(300),  # the first use of a kernel compiles it
]

BY_NAME = {recipe.name: recipe for recipe in RECIPES}
SETTINGS = {"dtype": "float32", "block_size": 16, "num_blocks": 40, "max_num_seqs": 5, "max_num_batched_tokens": 32}
PROMPTS = [random_tokens(n, seed=n) for n in (40, 3, 17, 29, 1, 8)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("models")


def write(folders: Path, name: str) -> Path:
    folder = folders / name
    if not folder.exists():
        BY_NAME[name].write(folder)
    return folder


@pytest.fixture(autouse=True)
def no_rest() -> Iterator[None]:
    """What a test has left on the GPU is not the next one's."""
    yield
    gc.collect()
    torch.cuda.empty_cache()


def on_cpu(folder: Path, **settings) -> LLM:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HEADRACE_KERNELS", "reference")
        return LLM(str(folder), device="cpu", **(SETTINGS | settings))


def on_gpu(folder: Path, **settings) -> LLM:
    return LLM(str(folder), device="cuda", **(SETTINGS | settings))


def run(llm: LLM, **params) -> list[RequestOutput]:
    params = SamplingParams(**({"temperature": 0, "max_tokens": 12, "ignore_eos": True} | params))
    return llm.generate([{"prompt_token_ids": prompt} for prompt in PROMPTS], params)


def tokens(outputs: list[RequestOutput]) -> list[list[int]]:
    return [output.outputs[0].token_ids for output in outputs]


@pytest.mark.parametrize("name", BY_NAME)
def test_greedy_tokens_are_the_cpus(folders, name) -> None:
    folder = write(folders, name)
    with on_gpu(folder, graphs=False) as llm:
        assert tokens(run(llm)) == tokens(run(on_cpu(folder)))


@pytest.mark.parametrize("name", ["llama-biases", "gemma2", "gemma3", "qwen3-moe", "opt-350m", "chatglm3"])
class TestGraphs:
    def test_all_steps_are_replayed_with_the_same_tokens(self, folders, name) -> None:
        folder = write(folders, name)
        with on_gpu(folder) as llm:
            step = llm.engine.model.executor.worker.decode_step
            assert sorted(step._layers) == [1, 2, 4, 5]
            assert step.obstacle is None
            found = tokens(run(llm))
        with on_gpu(folder, graphs=False) as llm:
            assert found == tokens(run(llm))

    def test_and_with_preemption_and_prefix_hits(self, folders, name) -> None:
        folder = write(folders, name)
        expected = tokens(run(on_cpu(folder)))
        with on_gpu(folder, num_blocks=8) as llm:
            assert tokens(run(llm)) == tokens(run(llm)) == expected
            assert llm.engine.metrics().num_preemptions > 0
        with on_gpu(folder) as llm:
            assert tokens(run(llm)) == tokens(run(llm)) == expected
            assert llm.engine.metrics().prefix_hit_tokens > 0


@pytest.mark.parametrize("quantize", ["int8", "int4"])
@pytest.mark.parametrize("kv_cache_dtype", ["auto", "int8"])
def test_quantized_models_give_the_references_tokens(folders, quantize, kv_cache_dtype) -> None:
    folder, settings = write(folders, "llama-gqa"), {"quantize": quantize, "kv_cache_dtype": kv_cache_dtype}
    with on_gpu(folder, **settings) as llm:
        assert tokens(run(llm)) == tokens(run(on_cpu(folder, **settings)))


def test_log_probabilities_and_draws_are_the_cpus(folders) -> None:
    folder, params = write(folders, "llama-gqa"), {"temperature": 0.7, "seed": 3, "logprobs": 3, "prompt_logprobs": 2}
    expected = run(on_cpu(folder), **params)
    with on_gpu(folder) as llm:
        found = run(llm, **params)
    assert tokens(found) == tokens(expected)
    for one, other in zip(found, expected, strict=True):
        rows = [*one.outputs[0].logprobs, *one.prompt_logprobs[1:]]
        for row, theirs in zip(rows, [*other.outputs[0].logprobs, *other.prompt_logprobs[1:]], strict=True):
            for token_id, entry in row.items():
                assert entry.logprob == pytest.approx(theirs[token_id].logprob, abs=1e-3)


def test_bfloat16_is_close_to_float32(folders) -> None:
    folder, params = write(folders, "llama-gqa"), {"max_tokens": 1, "prompt_logprobs": 1}
    exact = run(on_cpu(folder), **params)
    with on_gpu(folder, dtype="bfloat16") as llm:
        rough = run(llm, **params)
    gaps = [
        abs(row[token_id].logprob - theirs[token_id].logprob)
        for one, other in zip(rough, exact, strict=True)
        for row, theirs, token_id in zip(
            one.prompt_logprobs[1:], other.prompt_logprobs[1:], one.prompt_token_ids[1:], strict=True
        )
    ]
    assert sum(gaps) / len(gaps) < 0.5
    assert len(gaps) == sum(len(prompt) - 1 for prompt in PROMPTS)


class TestMemory:
    def test_what_a_model_took_is_given_back(self, folders) -> None:
        folder = write(folders, "llama-gqa")
        run(on_gpu(folder))  # what is loaded once for all stays
        gc.collect()
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        llm = on_gpu(folder, num_blocks=4000)
        run(llm)
        assert torch.cuda.memory_allocated() > before + 2**20
        llm.close()
        assert torch.cuda.memory_allocated() <= before + 2**16

    def test_the_cache_takes_most_of_what_is_free_and_leaves_room_for_steps(self, folders) -> None:
        folder = write(folders, "llama-gqa")
        free, _ = torch.cuda.mem_get_info()
        # So that not all full contexts fit, whatever the GPU.
        with on_gpu(folder, num_blocks=None, kv_cache_bytes=None, max_num_seqs=32) as llm:
            plan = llm.engine.model.plan
            assert 0 < plan.kv_cache_bytes < 0.9 * free
            assert tokens(run(llm)) == tokens(run(on_cpu(folder)))

    def test_a_model_that_does_not_fit_is_refused_in_one_line(self, folders) -> None:
        folder = write(folders, "llama-gqa")
        run(on_gpu(folder))  # kernels are loaded, which takes memory too
        with pytest.raises((OutOfDeviceMemory, ConfigError), match=r"out of memory|are free"), _little_room(2**20):
            on_gpu(folder, num_blocks=200_000)

    def test_a_step_without_room_fails_its_request_and_no_other(self, folders) -> None:
        """Prompts of one long chunk want memory that others do not."""
        recipe = BY_NAME["llama-gqa"]
        folder = folders / "long"
        replace(recipe, settings=recipe.settings | {"max_position_embeddings": 4096}).write(folder)
        params = SamplingParams(temperature=0, max_tokens=2, ignore_eos=True)
        first, second = ({"prompt_token_ids": random_tokens(4000, seed=seed)} for seed in (4, 5))
        with on_gpu(folder, max_num_batched_tokens=4096, num_blocks=600) as llm:
            expected = tokens(run(llm))
            assert llm.generate(first, params)[0].outputs[0].finish_reason == "length"
            with _little_room(2**19):
                [failed] = llm.generate(second, params)
                assert failed.outputs[0].finish_reason == "error"
                assert "does not fit the memory of cuda:0" in failed.outputs[0].error
            assert tokens(run(llm)) == expected
            assert llm.generate(second, params)[0].outputs[0].finish_reason == "length"


class _little_room:
    """Takes all of the GPU's memory but so many bytes, as a neighbour might."""

    def __init__(self, num_bytes: int) -> None:
        self._num_bytes = num_bytes

    def __enter__(self) -> None:
        torch.cuda.empty_cache()
        self._ballast = []
        for size in (2**30, 2**26, 2**21):
            # Page tables come out of the same memory, so that the last piece may not fit.
            with suppress(torch.OutOfMemoryError):
                while torch.cuda.mem_get_info()[0] > self._num_bytes + size:
                    self._ballast.append(torch.empty(size, dtype=torch.uint8, device="cuda"))

    def __exit__(self, *_: object) -> None:
        self._ballast.clear()
        torch.cuda.empty_cache()
