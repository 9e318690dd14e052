"""Qwen2 and 2.5 (biased q, k, v), Qwen3 (normalized q and k) and Qwen3-MoE."""

from dataclasses import replace

from headrace.config import ModelConfig, MoeConfig
from headrace.models.families.family import Family
from headrace.models.families.hf_config import HfConfig
from headrace.models.families.llama import attention_config, decoder_config, layer_configs


def read_qwen2(config: HfConfig) -> ModelConfig:
    attention = attention_config(config, qkv_bias=True)
    return decoder_config(
        "Qwen2ForCausalLM", config, attention=attention, layers=layer_configs(config, _windows(config))
    )


def read_qwen3(config: HfConfig, architecture: str = "Qwen3ForCausalLM") -> ModelConfig:
    bias = config.flag("attention_bias", False)
    # Qwen3 configs that name no head_dim mean 128, whatever hidden_size is.
    head_dim = config.integer("head_dim", 128) if architecture == "Qwen3ForCausalLM" else config.head_dim()
    attention = attention_config(
        config, qkv_bias=bias, output_bias=bias, qk_norm=True, head_dim=head_dim, softmax_scale=head_dim**-0.5
    )
    layers = layer_configs(config, _windows(config), head_dim=head_dim)
    return decoder_config(architecture, config, attention=attention, layers=layers)


def read_qwen3_moe(config: HfConfig) -> ModelConfig:
    dense = read_qwen3(config, "Qwen3MoeForCausalLM")
    moe = MoeConfig(
        # transformers 5 writes the count under Mixtral's name.
        num_experts=config.optional_integer("num_experts") or config.integer("num_local_experts"),
        num_experts_per_token=config.integer("num_experts_per_tok"),
        intermediate_size=config.integer("moe_intermediate_size"),
        renormalize=config.flag("norm_topk_prob", False),
    )
    step, dense_layers = config.integer("decoder_sparse_step", 1), config.integers("mlp_only_layers")
    layers = tuple(
        replace(layer, moe=None if i in dense_layers or (i + 1) % step else moe) for i, layer in enumerate(dense.layers)
    )
    return replace(dense, layers=layers)


def _windows(config: HfConfig) -> list[int | None]:
    """The window slides on layers from `max_window_layers` up, and only if use_sliding_window is set."""
    num_layers = config.integer("num_hidden_layers")
    window = config.optional_integer("sliding_window") if config.flag("use_sliding_window", False) else None
    full = config.integer("max_window_layers", 28, minimum=0)
    default = ["sliding_attention" if window and i >= full else "full_attention" for i in range(num_layers)]
    return [window if name == "sliding_attention" else None for name in config.layer_types(default)]


FAMILIES = (
    Family(architecture="Qwen2ForCausalLM", read_config=read_qwen2),
    Family(architecture="Qwen3ForCausalLM", read_config=read_qwen3),
    Family(architecture="Qwen3MoeForCausalLM", read_config=read_qwen3_moe),
)
