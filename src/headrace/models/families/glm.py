"""GLM-4 in transformers' own layout: half of each head rotated in interleaved pairs, gate and up fused."""

from dataclasses import replace

from headrace.config import ModelConfig, NormConfig, NormPlacement
from headrace.models.families.family import Family, Location
from headrace.models.families.hf_config import HfConfig
from headrace.models.families.llama import attention_config, decoder_config, layer_configs


def read_glm(config: HfConfig, architecture: str = "GlmForCausalLM") -> ModelConfig:
    return decoder_config(
        architecture,
        config,
        attention=attention_config(config, qkv_bias=config.flag("attention_bias", architecture == "GlmForCausalLM")),
        layers=layer_configs(config, partial=0.5, interleaved=True),
        norm=NormConfig(eps=config.number("rms_norm_eps", 1.5625e-7)),
    )


def read_glm4(config: HfConfig) -> ModelConfig:
    """GLM-4-0414: also normalizes what each sublayer returns."""
    base = read_glm(config, "Glm4ForCausalLM")
    return replace(base, norm=replace(base.norm, placement=NormPlacement.SANDWICH))


def locate(name: str, config: ModelConfig) -> Location:
    fused = name.replace(".gate_proj.", ".gate_up_proj.").replace(".up_proj.", ".gate_up_proj.")
    return Location(name=fused, row_offset=config.mlp.intermediate_size if ".up_proj." in name else 0)


FAMILIES = (
    Family(architecture="GlmForCausalLM", read_config=read_glm, locate=locate),
    Family(architecture="Glm4ForCausalLM", read_config=read_glm4, locate=locate),
)
