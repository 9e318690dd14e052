"""How large the cache becomes, and how long a sequence may be, for given memory."""

import logging
from pathlib import Path

import pytest
from tiny_model import write_tiny_model

from headrace.config import (
    Activation,
    AttentionConfig,
    CacheConfig,
    EngineConfig,
    LayerConfig,
    LoadConfig,
    MlpConfig,
    ModelConfig,
    NormConfig,
    RopeConfig,
    RopeScaling,
    RopeType,
    SchedulerConfig,
)
from headrace.config.settings import engine_config
from headrace.engine import load
from headrace.engine.engine import Engine
from headrace.engine.engine_plan import EnginePlan, resolve_max_model_len, resolve_plan
from headrace.errors import ConfigError, ContextLengthError

KV_TOKEN_BYTES = 2 * 3 * 2 * 8 * 4
"""Keys and values, 3 layers, 2 KV heads of 8 entries of 4 bytes."""


def model(scaling: RopeScaling | None = None) -> ModelConfig:
    return ModelConfig(
        architecture="LlamaForCausalLM",
        vocab_size=100,
        hidden_size=32,
        max_position_embeddings=256,
        layers=(LayerConfig(rope=RopeConfig(rotary_dim=8, scaling=scaling)),) * 3,
        attention=AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=8, softmax_scale=1.0),
        mlp=MlpConfig(intermediate_size=64, activation=Activation.SILU),
        norm=NormConfig(),
    )


def plan(available_bytes: int, *, max_model_len: int | None = None, **cache: object) -> EnginePlan:
    config = EngineConfig(
        load=LoadConfig(model="m"),
        cache=CacheConfig(**cache),  # type: ignore[arg-type]
        scheduler=SchedulerConfig(max_num_seqs=4, max_model_len=max_model_len),
    )
    return resolve_plan(
        config,
        max_model_len=max_model_len or 256,
        block_bytes=16 * KV_TOKEN_BYTES,
        available_bytes=available_bytes,
        num_threads=1,
    )


def test_plenty_of_memory_holds_every_full_context_and_no_more() -> None:
    result = plan(2**30)
    assert (result.num_blocks, result.max_model_len, result.remarks) == (4 * 256 // 16, 256, ())
    assert result.kv_cache_bytes == 4 * 256 * KV_TOKEN_BYTES


def test_budget_is_a_share_of_what_is_free() -> None:
    assert plan(2 * 300 * KV_TOKEN_BYTES).num_blocks == 300 // 16
    assert plan(2 * 300 * KV_TOKEN_BYTES, memory_fraction=1.0).num_blocks == 600 // 16


def test_default_length_gives_way_and_says_so() -> None:
    result = plan(2 * 64 * KV_TOKEN_BYTES)
    assert result.max_model_len == 64
    [remark] = result.remarks
    assert "max_model_len is 64 instead of 256" in remark


def test_whoever_loads_a_model_is_told_what_gave_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """`headrace serve` said nothing of a length that memory had cut; only `LLM` did."""
    folder = write_tiny_model(tmp_path)
    monkeypatch.setattr(load, "tightest_host", lambda reports: (reports[0].block_bytes, 40 * reports[0].block_bytes))
    with caplog.at_level(logging.WARNING, logger="headrace"):
        engine = Engine(load.load_model(engine_config(model=str(folder), device="cpu")))
    engine.close()
    [message] = caplog.messages
    assert f"max_model_len is {engine.model.plan.max_model_len} instead of 8192" in message


@pytest.mark.parametrize(
    "given", [{"max_model_len": 200}, {"kv_cache_bytes": 64 * KV_TOKEN_BYTES}], ids=["length", "budget"]
)
def test_what_was_asked_for_is_kept_or_refused(given: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match="room for 64 tokens"):
        plan(2 * 64 * KV_TOKEN_BYTES, **given)


@pytest.mark.parametrize(
    "given", [{"num_blocks": 50}, {"kv_cache_bytes": 400 * KV_TOKEN_BYTES}], ids=["blocks", "budget"]
)
def test_more_than_is_free_is_refused(given: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match=r"are free; give it at most 18 blocks"):
        plan(300 * KV_TOKEN_BYTES, **given)


def test_no_room_for_a_block() -> None:
    with pytest.raises(ConfigError, match="room for 0 tokens"):
        plan(KV_TOKEN_BYTES)


def test_length_is_the_models_or_shorter() -> None:
    assert resolve_max_model_len(SchedulerConfig(), model()) == 256
    assert resolve_max_model_len(SchedulerConfig(max_model_len=100), model()) == 100
    with pytest.raises(ContextLengthError, match="positions reach 256"):
        resolve_max_model_len(SchedulerConfig(max_model_len=257), model())


def test_length_may_grow_as_far_as_a_scaling_reaches() -> None:
    dynamic = RopeScaling(rope_type=RopeType.DYNAMIC, factor=4.0, original_max_position_embeddings=256)
    assert resolve_max_model_len(SchedulerConfig(), model(dynamic)) == 256
    assert resolve_max_model_len(SchedulerConfig(max_model_len=1024), model(dynamic)) == 1024
    with pytest.raises(ContextLengthError, match="positions reach 1024"):
        resolve_max_model_len(SchedulerConfig(max_model_len=1025), model(dynamic))
