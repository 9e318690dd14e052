"""The whole engine on Triton's kernels, in Triton's interpreter, against the reference's greedy tokens in float32."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from checkpoints import BY_NAME, random_tokens
from torch.utils._python_dispatch import TorchDispatchMode

from headrace import LLM, PoolingParams, SamplingParams
from headrace.config import Pooling
from headrace.engine import worker
from headrace.engine.device_sampler import DeviceSampler
from headrace.kernels import KernelChoice, resolve_kernels

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


CHANGING = [
    SamplingParams(temperature=0, max_tokens=2, logit_bias={7: 9.0, 11: 9.5}, logprobs=2),
    SamplingParams(temperature=0, max_tokens=2, repetition_penalty=1.8, frequency_penalty=1.0, presence_penalty=0.5),
    SamplingParams(temperature=0.8, seed=5, max_tokens=2, min_tokens=2, stop_token_ids=list(range(60))),
]


@pytest.mark.parametrize("folder", ["llama-biases"], indirect=True)
def test_what_requests_change_and_what_is_pooled_is_the_references(folder, monkeypatch) -> None:
    """Sampled as on a GPU: logits are changed where they lie, and no row of them comes to the host."""
    prompts = [{"prompt_token_ids": random_tokens(n, seed=n)} for n in (2, 3, 2)]
    pooled = {"prompt_token_ids": random_tokens(9, seed=4)}
    made = []

    def run(kernels: str) -> tuple[list, list]:
        monkeypatch.setenv("HEADRACE_KERNELS", kernels)
        sizes = {"block_size": 4, "num_blocks": 20, "max_num_batched_tokens": 7, "max_num_seqs": 4}
        llm = LLM(str(folder), dtype="float32", num_threads=1, **sizes)
        return llm.generate(prompts, CHANGING), [llm.embed(pooled, PoolingParams(pooling=how)) for how in Pooling]

    expected, expected_embeddings = run("reference")
    monkeypatch.setattr(
        worker, "Sampler", lambda: made.append(DeviceSampler(resolve_kernels(KernelChoice.TRITON))) or made[-1]
    )
    found, embeddings = run("triton")
    assert [sampler.copied_rows for sampler in made] == [0]
    for output, other in zip(found, expected, strict=True):
        assert output.outputs[0].token_ids == other.outputs[0].token_ids
        assert output.outputs[0].error is None
    for [output], [other] in zip(embeddings, expected_embeddings, strict=True):
        assert output.embedding == pytest.approx(other.embedding, abs=1e-5)


class NoLooks(TorchDispatchMode):
    """Refuses what would wait for the device, as a CUDA graph does."""

    LOOKS = ("aten::item", "aten::_local_scalar_dense", "aten::nonzero", "aten::is_nonzero", "aten::equal")

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func._schema.name not in self.LOOKS
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("formats", [{}, {"quantize": "int4", "kv_cache_dtype": "int8"}], ids=["float32", "int"])
def test_a_decode_step_can_be_captured(folder, formats, monkeypatch) -> None:
    """It looks at no tensor on the host, and makes none elsewhere than its inputs lie. Rows that stand for nobody are
    computed without harm, whatever is in memory."""
    monkeypatch.setenv("HEADRACE_KERNELS", "triton")
    settings = {"dtype": "float32", "block_size": 4, "num_blocks": 4, "max_num_seqs": 4, "num_threads": 1}
    runner = LLM(str(folder), **settings, **formats).engine.model.executor.worker._runner
    runner.decode_step.inputs.fill((), 3)

    def step() -> torch.Tensor:
        with torch.inference_mode():
            logits = runner._decoder.compute_logits(runner._forward(runner.decode_step.inputs.batch(3)))
            runner.kernels.argmax(logits)
            return logits

    monkeypatch.setattr(torch.Tensor, "tolist", None)
    with NoLooks():
        logits = step()
    with torch.device("meta"):
        assert torch.equal(step().cpu(), logits)
    assert logits.isfinite().all()
