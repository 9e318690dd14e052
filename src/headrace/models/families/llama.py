"""Llama 1, 2 and 3, and the settings that most families share."""

from typing import Any

from headrace.config import AttentionConfig, LayerConfig, MlpConfig, ModelConfig, NormConfig
from headrace.models.families.family import Family
from headrace.models.families.hf_config import HfConfig


def attention_config(config: HfConfig, **changes: Any) -> AttentionConfig:
    head_dim = config.head_dim()
    settings: dict[str, Any] = {
        "num_heads": config.integer("num_attention_heads"),
        "num_kv_heads": config.num_kv_heads(),
        "head_dim": head_dim,
        "softmax_scale": head_dim**-0.5,
    }
    return AttentionConfig(**(settings | changes))


def layer_configs(
    config: HfConfig, windows: list[int | None] | None = None, *, head_dim: int | None = None, **rope: Any
) -> tuple[LayerConfig, ...]:
    """One entry per layer, alike but for the sliding window."""
    num_layers = config.integer("num_hidden_layers")
    rope_config = config.rope(head_dim or config.head_dim(), **rope)
    return tuple(LayerConfig(sliding_window=window, rope=rope_config) for window in windows or [None] * num_layers)


def decoder_config(architecture: str, config: HfConfig, **changes: Any) -> ModelConfig:
    """A pre-norm decoder with RMS norm and a gated SiLU MLP, but for `changes`."""
    settings: dict[str, Any] = {
        "architecture": architecture,
        "vocab_size": config.integer("vocab_size"),
        "hidden_size": config.integer("hidden_size"),
        "max_position_embeddings": config.integer("max_position_embeddings", 2048),
        "norm": NormConfig(eps=config.number("rms_norm_eps", 1e-6)),
        "tie_word_embeddings": config.flag("tie_word_embeddings", False),
    }
    if "mlp" not in changes:
        settings["mlp"] = MlpConfig(
            intermediate_size=config.integer("intermediate_size"),
            activation=config.activation("hidden_act", "silu"),
            bias=config.flag("mlp_bias", False),
        )
    if "layers" not in changes:
        settings["layers"] = layer_configs(config)
    if "attention" not in changes:
        settings["attention"] = attention_config(config)
    return ModelConfig(**(settings | changes))


def read_config(config: HfConfig) -> ModelConfig:
    bias = config.flag("attention_bias", False)
    attention = attention_config(config, qkv_bias=bias, output_bias=bias)
    return decoder_config("LlamaForCausalLM", config, attention=attention)


FAMILIES = (Family(architecture="LlamaForCausalLM", read_config=read_config),)
