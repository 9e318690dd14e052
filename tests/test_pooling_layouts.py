"""Embeddings of several ranks: those of one process, and no byte exchanged for logits that nobody reads."""

import numpy as np
import pytest
from checkpoints import BY_NAME, HAS_NATIVE
from layout_cases import CROWDED, GREEDY, LAYOUTS, MAX_MODEL_LEN, PROMPTS, as_prompts, closing
from planned_run import assert_ledgers_as_predicted, record_plans
from thread_world import thread_llm

from headrace import LLM, PoolingParams
from headrace.config import Transport
from headrace.config.settings import parallel_config
from headrace.costs.exchanges import rules_of

LAST, MEAN = PoolingParams(), PoolingParams(pooling="mean", normalize=False)
REQUESTS = [(PROMPTS[i], None, params) for i in (0, 1, 2) for params in (GREEDY, LAST, MEAN)]
SHARED = {"tensor_parallel_size": 2, "kv_sharding": "sequence"}
FLAGS = {"send_residual": True, "slice_boundary": True, "gather_logits": True}
CASES = [
    pytest.param("llama-gqa", LAYOUTS["tp2"], id="tp2"),
    pytest.param("llama-gqa", LAYOUTS["pp2"], id="pp2"),
    pytest.param("llama-gqa", LAYOUTS["tp2-pp2"], id="tp2-pp2"),
    pytest.param("llama-gqa", LAYOUTS["tp2-pp2"] | FLAGS, id="tp2-pp2-literal"),
    pytest.param("opt-350m", LAYOUTS["tp2"], id="tp2-projected"),
    pytest.param(
        "llama-one-kv-head",
        SHARED,
        id="sequence",
        marks=pytest.mark.skipif(not HAS_NATIVE, reason="the native module is not built"),
    ),
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    paths = {name: tmp_path_factory.mktemp(name) for name in ("llama-gqa", "opt-350m", "llama-one-kv-head")}
    for name, path in paths.items():
        BY_NAME[name].write(path)
    return paths


def run(llm: LLM):
    outputs = llm._run(REQUESTS)
    assert llm.engine.metrics().num_preemptions > 0
    llm.engine.check_integrity()
    pooled = np.stack([output.embedding for output in outputs if output.embedding is not None])
    assert len(pooled) == 6
    return pooled, [output.outputs[0].token_ids for output in outputs if output.embedding is None]


@pytest.mark.parametrize(("name", "layout"), CASES)
def test_embeddings_are_those_of_one_process_and_bytes_those_predicted(folders, name, layout):
    with LLM(folders[name], dtype="float32", **CROWDED) as llm:
        expected, expected_tokens = run(llm)
    with closing(thread_llm(folders[name], **CROWDED, **layout)) as llm:
        plans = record_plans(llm)
        found, tokens = run(llm)
        executor, model = llm.engine.model.executor, llm.engine.model.config
        rules = rules_of(Transport.GLOO)
        assert_ledgers_as_predicted(executor.ledger_rows(), plans, model, parallel_config(**layout), rules)
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max(), rtol=0)
    assert tokens == expected_tokens


def test_no_logits_are_exchanged(folders):
    with closing(thread_llm(folders["llama-gqa"], max_model_len=MAX_MODEL_LEN, **LAYOUTS["tp2"])) as llm:
        llm.embed(as_prompts(PROMPTS), MEAN)
        llm.embed(as_prompts(PROMPTS), LAST)
        sites = {row.site for rows in llm.engine.model.executor.ledger_rows() for row in rows}
        assert sites == {f"layers.{i}.{part}" for i in range(2) for part in ("attention", "mlp")}
        llm.generate(as_prompts(PROMPTS[:1]), GREEDY)
        others = {row.site for rows in llm.engine.model.executor.ledger_rows() for row in rows} - sites
        assert others == {"candidates"}


def test_a_later_process_sends_them_to_the_first(folders):
    """The last stage has them, and the engine is with the first."""
    with LLM(folders["llama-gqa"], dtype="float32", **CROWDED) as llm:
        expected, expected_tokens = run(llm)
    with LLM(folders["llama-gqa"], dtype="float32", **CROWDED, **LAYOUTS["pp2"]) as llm:
        found, tokens = run(llm)
        assert llm.engine.model.executor.exchange_differences() == []
    assert found.tobytes() == expected.tobytes(), "stages change no bit"
    assert tokens == expected_tokens
