"""Engines whose ranks split contexts, as processes of their own, against an engine of one rank."""

from pathlib import Path

import pytest
from checkpoints import BY_NAME, HAS_NATIVE, random_tokens

from headrace import LLM, SamplingParams
from headrace.config import KvSharding, ParallelConfig, Transport
from headrace.costs.exchanges import Layout, rules_of
from headrace.costs.sites import Phase
from headrace.costs.steps import ForwardPass
from headrace.costs.volume import RankVolume

pytestmark = pytest.mark.skipif(not HAS_NATIVE, reason="the native module is not built")

NUM_BLOCKS, BLOCK_SIZE = 26, 4
SETTINGS = {
    "num_blocks": NUM_BLOCKS,
    "block_size": BLOCK_SIZE,
    "max_num_batched_tokens": 16,
    "max_num_seqs": 4,
    "num_threads": 1,
}


def requests() -> tuple[list[dict], list[SamplingParams]]:
    """Of one token and of many, in chunks; with a common prefix; with forks; more than the cache has room for."""
    prompts = [random_tokens(count, seed=count) for count in (1, 9, 20, 50)]
    prompts.append([*prompts[3][:45], 5, 6])
    params = [SamplingParams(max_tokens=50, temperature=0) for _ in prompts]
    params[1] = SamplingParams(max_tokens=8, temperature=0.8, n=2, seed=5)
    return [{"prompt_token_ids": prompt} for prompt in prompts], params


def outputs(llm: LLM) -> list[list[tuple[int, ...]]]:
    prompts, params = requests()
    return [[tuple(out.token_ids) for out in result.outputs] for result in llm.generate(prompts, params)]


def run(folder: Path, **parallel):
    """Outputs, whether sequences had to start over, the cache's bytes in all, and each rank's ledger."""
    llm = LLM(str(folder), **SETTINGS, **{name: getattr(value, "value", value) for name, value in parallel.items()})
    try:
        found = outputs(llm)
        engine = llm.engine
        ledgers = engine.model.executor.ledger_rows() if parallel else []
        return found, engine._scheduler.num_preemptions, engine.model.plan.kv_cache_bytes, ledgers, engine.model.config
    finally:
        llm.close()


CASES = [
    ("llama-one-kv-head", 2, KvSharding.SEQUENCE, Transport.SHM),
    ("chatglm3", 4, KvSharding.SEQUENCE_FUSED, Transport.SHM),
    ("llama-one-kv-head", 2, KvSharding.SEQUENCE, Transport.GLOO),
]


@pytest.mark.parametrize(("name", "size", "sharding", "transport"), CASES, ids=lambda x: str(getattr(x, "value", x)))
def test_tokens_are_those_of_one_rank_and_bytes_those_predicted(tmp_path, name, size, sharding, transport):
    BY_NAME[name].write(tmp_path)
    expected, alone_preemptions, alone_bytes, _, _ = run(tmp_path)
    settings = {"tensor_parallel_size": size, "kv_sharding": sharding, "transport": transport}
    found, num_preemptions, cache_bytes, ledgers, config = run(tmp_path, **settings)
    assert found == expected
    assert num_preemptions == alone_preemptions > 0
    # Kept once in all, where copies would take size / num_kv_heads as much; each rank's last block may be left over.
    assert alone_bytes <= cache_bytes <= alone_bytes * (1 + size / NUM_BLOCKS)

    layout = Layout(model=config, parallel=ParallelConfig(**settings), activation_bytes=4, rules=rules_of(transport))
    for rank, rows in enumerate(ledgers):
        kv_rows = [row for row in rows if row.group == "kv"]
        assert kv_rows
        for phase in Phase:
            num_steps, num_tokens = steps_and_tokens(rows, phase, config)
            assert num_steps > 0
            # Direct exchange is linear in tokens.
            one = RankVolume(layout, rank).rows({ForwardPass(num_tokens=1, phase=phase): 1})
            predicted = {
                (row.operation, row.site): (
                    num_steps * row.count,
                    num_tokens * row.payload_bytes,
                    num_tokens * row.wire_bytes,
                )
                for row in one
                if row.group == "kv"
            }
            counted = {
                (row.operation, row.site): (row.count, row.payload_bytes, row.wire_bytes)
                for row in kv_rows
                if row.phase is phase
            }
            assert counted == predicted


def steps_and_tokens(rows: list[dict], phase: Phase, config) -> tuple[int, int]:
    """Of a phase, from the all-reduces of the first layer's attention, which are the same however contexts lie."""
    sums = [row for row in rows if (row.site, row.phase) == ("layers.0.attention", phase)]
    payload_bytes = sum(row.payload_bytes for row in sums)
    return sum(row.count for row in sums), payload_bytes // (config.hidden_size * 4)


def test_decode_steps_are_replayed(tmp_path):
    """Every op between the exchanges, and the exchanges, are native."""
    BY_NAME["llama-one-kv-head"].write(tmp_path)
    for sharding in (KvSharding.SEQUENCE, KvSharding.SEQUENCE_FUSED):
        llm = LLM(str(tmp_path), **SETTINGS, tensor_parallel_size=2, kv_sharding=sharding.value)
        try:
            outputs(llm)
            worker = llm.engine.model.executor.worker
            assert worker._runner._kv_pool.spec.num_blocks == NUM_BLOCKS // 2
            step = worker.decode_step
            assert step.obstacle is None
            assert {num_seqs for num_seqs, layers in step._layers.items() if layers.recording.replay is not None} >= {
                1,
                2,
            }
        finally:
            llm.close()
