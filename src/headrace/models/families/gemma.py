"""Gemma 2 (soft caps) and Gemma 3 text (normalized q and k): scaled embeddings, alternating windows, norms before and
after each sublayer whose scale is 1 + weight."""

from collections.abc import Mapping

from headrace.config import EmbeddingConfig, LayerConfig, MlpConfig, ModelConfig, NormConfig, NormPlacement, RopeConfig
from headrace.models.families.family import Family, Location
from headrace.models.families.hf_config import HfConfig
from headrace.models.families.llama import attention_config, decoder_config

_RENAMED = {
    ".post_attention_layernorm.": ".pre_feedforward_layernorm.",
    ".post_self_attn_layernorm.": ".post_attention_layernorm.",
    ".post_mlp_layernorm.": ".post_feedforward_layernorm.",
}


def read_gemma2(config: HfConfig) -> ModelConfig:
    rope = config.rope(config.integer("head_dim", 256))
    layers = _layers(config, period=2, ropes={"full_attention": rope, "sliding_attention": rope})
    return _gemma(
        "Gemma2ForCausalLM",
        config,
        layers,
        logit_soft_cap=config.optional_number("attn_logit_softcapping"),
        qk_norm=False,
    )


def read_gemma3(config: HfConfig) -> ModelConfig:
    """Sliding layers rotate with their own theta, and only full layers are stretched."""
    head_dim = config.integer("head_dim", 256)
    full = config.rope(head_dim, layer_type="full_attention", default_theta=1e6)
    parameters = config.data.get("rope_parameters")
    if isinstance(parameters, Mapping) and "sliding_attention" in parameters:
        sliding = config.rope(head_dim, layer_type="sliding_attention")
    else:
        sliding = RopeConfig(rotary_dim=head_dim, theta=config.number("rope_local_base_freq", 10000.0))
    period = config.integer("sliding_window_pattern", 6)
    layers = _layers(config, period=period, ropes={"full_attention": full, "sliding_attention": sliding})
    return _gemma("Gemma3ForCausalLM", config, layers, logit_soft_cap=None, qk_norm=True)


def locate(name: str, config: ModelConfig) -> Location:  # noqa: ARG001
    for ours, theirs in _RENAMED.items():
        if ours in name:
            return Location(name=name.replace(ours, theirs))
    return Location(name=name)


def _layers(config: HfConfig, period: int, ropes: dict[str, RopeConfig]) -> tuple[LayerConfig, ...]:
    """Every `period`-th layer sees everything, the others a window."""
    num_layers = config.integer("num_hidden_layers")
    default = ["sliding_attention" if (i + 1) % period else "full_attention" for i in range(num_layers)]
    window = config.integer("sliding_window", 4096)
    return tuple(
        LayerConfig(sliding_window=window if name == "sliding_attention" else None, rope=ropes[name])
        for name in config.layer_types(default)
    )


def _gemma(
    architecture: str,
    config: HfConfig,
    layers: tuple[LayerConfig, ...],
    *,
    logit_soft_cap: float | None,
    qk_norm: bool,
) -> ModelConfig:
    config.refuse("use_bidirectional_attention", False)
    bias = config.flag("attention_bias", False)
    return decoder_config(
        architecture,
        config,
        layers=layers,
        attention=attention_config(
            config,
            head_dim=config.integer("head_dim", 256),
            softmax_scale=config.number("query_pre_attn_scalar", 256) ** -0.5,
            qkv_bias=bias,
            output_bias=bias,
            logit_soft_cap=logit_soft_cap,
            qk_norm=qk_norm,
        ),
        mlp=MlpConfig(
            intermediate_size=config.integer("intermediate_size"),
            activation=config.activation("hidden_activation", "gelu_pytorch_tanh"),
        ),
        norm=NormConfig(eps=config.number("rms_norm_eps", 1e-6), unit_offset=True, placement=NormPlacement.SANDWICH),
        embedding=EmbeddingConfig(scale=config.integer("hidden_size") ** 0.5),
        tie_word_embeddings=config.flag("tie_word_embeddings", True),
        final_logit_soft_cap=config.optional_number("final_logit_softcapping"),
    )


FAMILIES = (
    Family(architecture="Gemma2ForCausalLM", read_config=read_gemma2, locate=locate),
    Family(architecture="Gemma3ForCausalLM", read_config=read_gemma3, locate=locate),
)
