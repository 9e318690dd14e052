"""Embeddings against transformers' last hidden states, and against themselves: alone, in a crowd, in chunks."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from checkpoints import BY_NAME, HAS_NATIVE, MAX_LEN, random_tokens

from headrace import LLM, PoolingParams, RequestOutput, SamplingParams
from headrace.errors import ContextLengthError, RequestError

FAMILIES = ("llama-gqa", "qwen2-window", "gemma2", "opt", "opt-350m", "mixtral", "chatglm3", "glm4")
LAST, MEAN = PoolingParams(normalize=False), PoolingParams(pooling="mean", normalize=False)
PREFIX = random_tokens(40, seed=1)
PROMPTS = (PREFIX + random_tokens(9, seed=2), random_tokens(23, seed=3), [5], PREFIX + random_tokens(71, seed=4))
TOLERANCE = 1e-5
"""Of the largest element: float32, summed in another order."""


def as_prompts(token_lists):
    return [{"prompt_token_ids": tokens} for tokens in token_lists]


def embeddings(llm: LLM, params: PoolingParams | None, prompts=PROMPTS) -> np.ndarray:
    return np.stack([output.embedding for output in llm.embed(as_prompts(prompts), params)])


def make_llm(folder, **settings) -> LLM:
    return LLM(folder, **{"dtype": "float32", "num_threads": 1, **settings})


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    BY_NAME["llama-gqa"].write(folder)
    return folder


@pytest.fixture(scope="module")
def alone(llama) -> dict[PoolingParams, np.ndarray]:
    """Each prompt by itself, in one chunk, with nothing cached."""
    found = {}
    for params in (LAST, MEAN):
        with make_llm(llama, enable_prefix_caching=False) as llm:
            found[params] = np.concatenate([embeddings(llm, params, [prompt]) for prompt in PROMPTS])
    return found


@pytest.mark.parametrize("name", FAMILIES)
def test_against_transformers(name, tmp_path):
    model = BY_NAME[name].write(tmp_path)
    with torch.inference_mode():
        states = [model.get_decoder()(torch.tensor([prompt])).last_hidden_state[0].double() for prompt in PROMPTS]
    expected = {LAST: [rows[-1] for rows in states], MEAN: [rows.mean(0) for rows in states]}
    # In chunks that are no multiple of anything.
    with make_llm(tmp_path, max_num_batched_tokens=13, max_num_seqs=3) as llm:
        for params, vectors in expected.items():
            for found, vector in zip(embeddings(llm, params), vectors, strict=True):
                assert found.dtype == np.float32
                np.testing.assert_allclose(found, vector, atol=TOLERANCE * vector.abs().max(), rtol=0)
                assert np.abs(found).max() > 0.1, "an oracle of zeros would agree with anything"


def test_the_default_is_the_last_state_at_length_1(llama, alone):
    with make_llm(llama) as llm:
        found = embeddings(llm, None)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, rtol=1e-6)
    expected = alone[LAST] / np.linalg.norm(alone[LAST].astype(np.float64), axis=1, keepdims=True)
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def generated(outputs: list[RequestOutput]):
    return [[c.token_ids for c in output.outputs] for output in outputs]


@pytest.mark.skipif(not HAS_NATIVE, reason="the reference kernels promise no such thing")
@pytest.mark.parametrize("params", [LAST, MEAN], ids=["last", "mean"])
@pytest.mark.parametrize(
    "settings",
    [
        {"max_num_seqs": 8},
        {"max_num_batched_tokens": 7, "max_num_seqs": 5},
        {"max_num_batched_tokens": 64, "num_blocks": 9, "max_num_seqs": 5},
    ],
    ids=["batched", "chunked", "preempted"],
)
def test_the_same_bits_beside_requests_that_generate(llama, alone, params, settings):
    greedy = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
    with make_llm(llama) as llm:
        texts = [prompt for prompt in PROMPTS for _ in range(2)]
        expected = generated(llm.generate(as_prompts(texts), greedy))
    with make_llm(llama, **settings) as llm:
        requests = []
        for prompt in PROMPTS:
            requests += [(prompt, None, greedy), (prompt, None, params), (prompt, None, greedy)]
        outputs = llm._run(requests)
        llm.engine.check_integrity()
        assert llm.engine.metrics().kv_cache_usage == 0
        assert (llm.engine.metrics().num_preemptions > 0) == ("num_blocks" in settings)
    pooled = [output for output in outputs if output.embedding is not None]
    assert np.stack([output.embedding for output in pooled]).tobytes() == alone[params].tobytes()
    assert generated([output for output in outputs if output.embedding is None]) == expected
    for output in pooled:
        assert [(c.finish_reason, c.text, c.token_ids) for c in output.outputs] == [("stop", "", [])]
        assert (output.metrics.num_completion_tokens, output.metrics.first_token_s) == (0, None)


@pytest.mark.skipif(not HAS_NATIVE, reason="the reference kernels promise no such thing")
def test_a_preempted_prompt_is_pooled_again(llama, alone):
    """An older request takes the blocks of a prompt that is half computed."""
    for params, expected in alone.items():
        with make_llm(llama, max_num_batched_tokens=8, max_num_seqs=2, num_blocks=10, block_size=16) as llm:
            engine = llm.engine
            engine.add_request("old", [7], SamplingParams(temperature=0, max_tokens=60, ignore_eos=True))
            engine.add_pooling_request("pooled", PROMPTS[3], params)
            finished = {}
            while engine.has_unfinished:
                finished |= {u.request_id: u.finished for u in engine.step() if u.finished is not None}
                if len(finished) == 0 and engine.metrics().num_steps == 6:
                    assert engine._scheduler.preempt_newest()
        assert finished["pooled"].metrics.num_preemptions == 1
        assert finished["pooled"].embedding.tobytes() == expected[3].tobytes()


@pytest.mark.skipif(not HAS_NATIVE, reason="the reference kernels promise no such thing")
def test_the_last_state_uses_the_cache_and_the_mean_cannot(llama, alone):
    with make_llm(llama) as llm:
        for params, num_cached in ((LAST, 32), (MEAN, 0)):
            assert embeddings(llm, params).tobytes() == alone[params].tobytes()
            [output] = llm.embed(as_prompts([PROMPTS[0]]), params)
            assert output.metrics.num_cached_tokens == num_cached + 16 * (num_cached > 0)
            assert output.embedding.tobytes() == alone[params][0].tobytes()


@pytest.mark.skipif(not HAS_NATIVE, reason="the reference kernels promise no such thing")
def test_a_step_that_failed_has_added_to_no_sum(llama, alone, monkeypatch):
    """The memory ends when the logits of another request are computed, and the step's chunks run once more."""
    with make_llm(llama, max_num_batched_tokens=16, max_num_seqs=2) as llm:
        engine = llm.engine
        runner = engine.model.executor.worker._runner
        logits, num_calls = runner.logits, 0

        def logits_but_once(hidden_states):
            nonlocal num_calls
            num_calls += 1
            if num_calls == 2:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
            return logits(hidden_states)

        monkeypatch.setattr(runner, "logits", logits_but_once)
        engine.add_pooling_request("pooled", PROMPTS[3], MEAN)
        engine.add_request("other", [7], SamplingParams(temperature=0, max_tokens=9, ignore_eos=True))
        finished = {}
        while engine.has_unfinished:
            finished |= {u.request_id: u.finished for u in engine.step() if u.finished is not None}
    assert [finished[name].metrics.num_preemptions for name in ("pooled", "other")] == [0, 1]
    assert finished["pooled"].embedding.tobytes() == alone[MEAN][3].tobytes()


def test_a_prompt_as_long_as_the_model_allows(llama):
    """Nothing is generated, so the prompt may take all of the model's length, and every block there is."""
    prompt = random_tokens(MAX_LEN, seed=9)
    with make_llm(llama, num_blocks=MAX_LEN // 16) as llm:
        assert np.isfinite(embeddings(llm, MEAN, [prompt])).all()
        with pytest.raises(ContextLengthError, match=rf"has {MAX_LEN + 1} tokens, but it may have {MAX_LEN}.*most 128"):
            llm.embed(as_prompts([[*prompt, 1]]))
    with (
        make_llm(llama, num_blocks=3) as llm,
        pytest.raises(ContextLengthError, match=r"need 4 KV .* has 3; shorten the prompt to at most 48 tokens"),
    ):
        llm.embed(as_prompts([prompt[:49]]))


def test_what_cannot_be_pooled(llama):
    with make_llm(llama) as llm:
        for prompts, message in (([], "the prompt has 0 tokens"), ([4000], "prompt token 4000 is not in the vocab")):
            with pytest.raises(RequestError, match=message):
                llm.embed(as_prompts([prompts]))
        with pytest.raises(RequestError, match=r"give PoolingParams\(...\)"):
            llm.embed(as_prompts([[1]]), SamplingParams())
        assert not llm.engine.has_unfinished


def test_an_aborted_prompt_has_no_embedding(llama):
    with make_llm(llama, max_num_batched_tokens=8, max_num_seqs=2) as llm:
        llm.engine.add_pooling_request("x", PROMPTS[0], MEAN)
        llm.engine.step()
        update = llm.engine.abort("x")
        assert update.finished.embedding is None
        assert update.finished.outputs[0].finish_reason == "abort"
        assert not llm.engine.has_unfinished
        assert embeddings(llm, MEAN, PROMPTS[:1]).shape == (1, 64)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_hidden_states_that_are_no_numbers_fail_alone(llama, tmp_path, pooling, normalize):
    """Token 5's embedding is NaN."""
    from safetensors.torch import load_file, save_file

    for file in llama.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.embed_tokens.weight"][5] = torch.nan
    save_file(tensors, tmp_path / "model.safetensors")
    params = PoolingParams(pooling=pooling, normalize=normalize)
    with make_llm(tmp_path, enable_prefix_caching=False) as llm:
        clean = [token for token in PROMPTS[1] if token != 5]
        bad, good = llm.embed(as_prompts([[5, 6], clean]), params)
    assert (bad.embedding, bad.outputs[0].finish_reason) == (None, "error")
    assert "not finite" in bad.outputs[0].error
    assert np.isfinite(good.embedding).all()


class TestParams:
    @pytest.mark.parametrize(
        ("given", "message"),
        [
            ({"pooling": "cls"}, "pooling is 'cls'; allowed: last or mean"),
            ({"pooling": None}, "pooling is None"),
            ({"normalize": 1}, "normalize is 1; allowed: true or false"),
            ({"dimensions": 3}, "unknown pooling parameter 'dimensions'; "),
        ],
    )
    def test_refused(self, given, message):
        with pytest.raises(RequestError, match=message):
            PoolingParams.from_mapping(given)

    @pytest.mark.parametrize("params", [PoolingParams(), LAST, MEAN, replace(MEAN, normalize=True)])
    def test_to_plain_data_and_back(self, params):
        assert PoolingParams.from_mapping(params.to_mapping()) == params
