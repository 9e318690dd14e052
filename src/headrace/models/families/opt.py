"""OPT: learned positions, ReLU, biases and layer norm; the 350m model normalizes after its sublayers and projects
its narrower embeddings in and out."""

from headrace.config import (
    AttentionConfig,
    EmbeddingConfig,
    LayerConfig,
    MlpConfig,
    ModelConfig,
    NormConfig,
    NormKind,
    NormPlacement,
)
from headrace.models.families.family import Family, Location
from headrace.models.families.hf_config import HfConfig

# The position table starts with two rows for padding that no token uses.
_POSITION_OFFSET = 2

_RENAMED = {
    "model.norm.": "model.final_layer_norm.",
    ".input_layernorm.": ".self_attn_layer_norm.",
    ".post_attention_layernorm.": ".final_layer_norm.",
    ".o_proj.": ".out_proj.",
    ".mlp.up_proj.": ".fc1.",
    ".mlp.down_proj.": ".fc2.",
}


def read_config(config: HfConfig) -> ModelConfig:
    config.refuse("layer_norm_elementwise_affine", True)
    hidden_size, num_heads, head_dim = (
        config.integer("hidden_size"),
        config.integer("num_attention_heads"),
        config.head_dim(),
    )
    positions = config.integer("max_position_embeddings")
    bias, pre_norm = config.flag("enable_bias", True), config.flag("do_layer_norm_before", True)
    width = config.integer("word_embed_proj_dim", hidden_size)
    return ModelConfig(
        architecture="OPTForCausalLM",
        vocab_size=config.integer("vocab_size"),
        hidden_size=hidden_size,
        max_position_embeddings=positions,
        layers=(LayerConfig(),) * config.integer("num_hidden_layers"),
        attention=AttentionConfig(
            num_heads=num_heads,
            num_kv_heads=num_heads,
            head_dim=head_dim,
            softmax_scale=head_dim**-0.5,
            qkv_bias=bias,
            output_bias=bias,
        ),
        mlp=MlpConfig(
            intermediate_size=config.integer("ffn_dim"),
            activation=config.activation("activation_function", "relu"),
            gated=False,
            bias=bias,
        ),
        norm=NormConfig(
            kind=NormKind.LAYER,
            eps=1e-5,
            placement=NormPlacement.PRE if pre_norm else NormPlacement.POST,
            has_final_norm=pre_norm and not config.flag("_remove_final_layer_norm", False),
        ),
        embedding=EmbeddingConfig(
            num_positions=positions + _POSITION_OFFSET,
            position_offset=_POSITION_OFFSET,
            projection_size=None if width == hidden_size else width,
        ),
        tie_word_embeddings=config.flag("tie_word_embeddings", True),
    )


def locate(name: str, config: ModelConfig) -> Location:  # noqa: ARG001
    for ours, theirs in _RENAMED.items():
        name = name.replace(ours, theirs)
    return Location(name=name.replace("model.", "model.decoder.", 1))


FAMILIES = (Family(architecture="OPTForCausalLM", read_config=read_config, locate=locate),)
