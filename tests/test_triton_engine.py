"""The whole engine on Triton's kernels, in Triton's interpreter, against the reference's greedy tokens in float32."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from checkpoints import BY_NAME, random_tokens

from headrace import LLM, SamplingParams

pytest.importorskip("triton")
if torch.cuda.is_available():
    pytest.skip("a GPU runs the kernels themselves: tests/test_gpu_engine.py", allow_module_level=True)

NUM_LAYERS = {
    "llama-biases": 1,
    "gemma2": 2,  # a sliding window in one, soft caps in both
    "qwen3-moe": 1,  # a mixture of experts, normalized queries and keys
}
SHARED = random_tokens(8, seed=99)
PROMPTS = [SHARED + random_tokens(3, seed=1), SHARED + random_tokens(3, seed=3)]
NUM_TOKENS = 5


@pytest.fixture(scope="module", params=NUM_LAYERS)
def folder(request, tmp_path_factory) -> Path:
    recipe = BY_NAME[request.param]
    folder = tmp_path_factory.mktemp("models") / recipe.name
    replace(recipe, settings=recipe.settings | {"num_hidden_layers": NUM_LAYERS[recipe.name]}).write(folder)
    return folder


def tokens(folder: Path, kernels: str) -> tuple[list[list[int]], LLM]:
    """Prompts come in chunks, find each other's blocks, and preempt each other."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HEADRACE_KERNELS", kernels)
        llm = LLM(
            str(folder),
            dtype="float32",
            block_size=4,
            num_blocks=5,
            max_num_seqs=2,
            max_num_batched_tokens=7,
            num_threads=1,
        )
    params = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True)
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in PROMPTS], params)
    return [output.outputs[0].token_ids for output in outputs], llm


def test_tokens_are_the_references(folder) -> None:
    expected, _ = tokens(folder, "reference")
    found, llm = tokens(folder, "triton")
    assert found == expected
    metrics = llm.engine.metrics()
    assert metrics.num_preemptions > 0
    assert metrics.prefix_hit_tokens > 0
    assert metrics.num_steps > NUM_TOKENS
    assert {row.implementation for row in llm.engine.model.kernels.explain()} >= {"triton"}
