"""ChatGLM2, ChatGLM3 and GLM-4 as first published: q, k, v fused, gate and up fused, few KV heads."""

from headrace.config import (
    Activation,
    AttentionConfig,
    LayerConfig,
    MlpConfig,
    ModelConfig,
    NormConfig,
    NormKind,
    RopeConfig,
    RopeScaling,
    RopeType,
)
from headrace.errors import CheckpointError
from headrace.models.families.family import Family, Location
from headrace.models.families.hf_config import HfConfig

_RENAMED = {
    "model.embed_tokens.": "transformer.embedding.word_embeddings.",
    "model.norm.": "transformer.encoder.final_layernorm.",
    "lm_head.": "transformer.output_layer.",
    "model.layers.": "transformer.encoder.layers.",
    ".o_proj.": ".dense.",
    ".down_proj.": ".dense_4h_to_h.",
    ".gate_proj.": ".dense_h_to_4h.",
    ".up_proj.": ".dense_h_to_4h.",
    ".q_proj.": ".query_key_value.",
    ".k_proj.": ".query_key_value.",
    ".v_proj.": ".query_key_value.",
    ".self_attn.": ".self_attention.",
}


def read_config(config: HfConfig, architecture: str) -> ModelConfig:
    # Version 1 of ChatGLM shares the architecture's name but is a prefix model with two-dimensional positions.
    config.integer("padded_vocab_size")
    # Every published text model has original_rope true: pairs lie side by side. CogAgent's false means half by half.
    config.refuse("original_rope", True)
    config.refuse("apply_residual_connection_post_layernorm", False)
    config.refuse("pre_seq_len")
    config.refuse("quantization_bit", 0)
    if not config.flag("multi_query_attention", False):
        raise CheckpointError("config.json: multi_query_attention is not true; q, k and v then lie mixed head by head")
    head_dim, num_heads = config.integer("kv_channels"), config.integer("num_attention_heads")
    linear_bias = config.flag("add_bias_linear", False)
    return ModelConfig(
        architecture=architecture,
        vocab_size=config.integer("padded_vocab_size"),
        hidden_size=config.integer("hidden_size"),
        max_position_embeddings=config.integer("seq_length"),
        layers=(LayerConfig(rope=_rope(config, head_dim)),) * config.integer("num_layers"),
        attention=AttentionConfig(
            num_heads=num_heads,
            num_kv_heads=config.integer("multi_query_group_num"),
            head_dim=head_dim,
            softmax_scale=head_dim**-0.5,
            qkv_bias=linear_bias or config.flag("add_qkv_bias", False),
            output_bias=linear_bias,
        ),
        mlp=MlpConfig(
            intermediate_size=config.integer("ffn_hidden_size"), activation=Activation.SILU, bias=linear_bias
        ),
        norm=NormConfig(
            kind=NormKind.RMS if config.flag("rmsnorm", True) else NormKind.LAYER,
            eps=config.number("layernorm_epsilon", 1e-5),
            has_final_norm=config.flag("post_layer_norm", True),
        ),
        tie_word_embeddings=config.flag("tie_word_embeddings", False),
    )


def _rope(config: HfConfig, head_dim: int) -> RopeConfig:
    """Half of each head is rotated. rope_ratio multiplies theta, but in ChatGLM2-32k it divides positions, and only
    the name tells: the two have the same architecture and the same keys."""
    ratio, theta, scaling = config.number("rope_ratio", 1.0), 10000.0, None
    if ratio != 1 and "chatglm2" in str(config.data.get("_name_or_path")).lower():
        length = max(1, int(config.integer("seq_length") / ratio))
        scaling = RopeScaling(rope_type=RopeType.LINEAR, factor=ratio, original_max_position_embeddings=length)
    else:
        theta *= ratio
    return RopeConfig(rotary_dim=head_dim // 2, theta=theta, interleaved=True, scaling=scaling)


def locate(name: str, config: ModelConfig) -> Location:
    attention = config.attention
    query_rows, kv_rows = (heads * attention.head_dim for heads in (attention.num_heads, attention.num_kv_heads))
    offsets = {
        ".k_proj.": query_rows,
        ".v_proj.": query_rows + kv_rows,
        ".up_proj.": config.mlp.intermediate_size,
    }
    row_offset = next((rows for part, rows in offsets.items() if part in name), 0)
    for ours, theirs in _RENAMED.items():
        name = name.replace(ours, theirs)
    return Location(name=name, row_offset=row_offset)


def _family(architecture: str) -> Family:
    return Family(
        architecture=architecture,
        read_config=lambda config: read_config(config, architecture),
        locate=locate,
        ignored=(r"transformer\.rotary_pos_emb\.inv_freq",),
    )


FAMILIES = (_family("ChatGLMModel"), _family("ChatGLMForConditionalGeneration"))
