"""Mixtral: Mistral with eight experts, two to a token."""

from dataclasses import replace

from headrace.config import ModelConfig, MoeConfig
from headrace.models.families.family import Family, Location
from headrace.models.families.hf_config import HfConfig
from headrace.models.families.llama import decoder_config, layer_configs

_EXPERT_NAMES = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}


def read_config(config: HfConfig) -> ModelConfig:
    moe = MoeConfig(
        num_experts=config.integer("num_local_experts"),
        num_experts_per_token=config.integer("num_experts_per_tok"),
        intermediate_size=config.integer("intermediate_size"),
    )
    windows = [config.optional_integer("sliding_window")] * config.integer("num_hidden_layers")
    layers = tuple(replace(layer, moe=moe) for layer in layer_configs(config, windows, default_theta=1e6))
    return decoder_config("MixtralForCausalLM", config, layers=layers)


def locate(name: str, config: ModelConfig) -> Location:  # noqa: ARG001
    if ".mlp." not in name:
        return Location(name=name)
    for ours, theirs in _EXPERT_NAMES.items():
        name = name.replace(ours, theirs)
    return Location(name=name.replace(".mlp.", ".block_sparse_moe."))


FAMILIES = (Family(architecture="MixtralForCausalLM", read_config=read_config, locate=locate),)
