"""Mistral: Llama with a sliding window on every layer, if config.json gives one."""

from headrace.config import ModelConfig
from headrace.models.families.family import Family
from headrace.models.families.hf_config import HfConfig
from headrace.models.families.llama import decoder_config, layer_configs


def read_config(config: HfConfig) -> ModelConfig:
    windows = [config.optional_integer("sliding_window")] * config.integer("num_hidden_layers")
    return decoder_config("MistralForCausalLM", config, layers=layer_configs(config, windows))


FAMILIES = (Family(architecture="MistralForCausalLM", read_config=read_config),)
