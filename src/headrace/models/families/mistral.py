"""Mistral: Llama with a sliding window on every layer, unless config.json says null."""

from headrace.config import ModelConfig
from headrace.models.families.family import Family
from headrace.models.families.hf_config import HfConfig
from headrace.models.families.llama import decoder_config, layer_configs


def read_config(config: HfConfig) -> ModelConfig:
    # Absent means 4096, as in transformers; only null means none.
    window = config.optional_integer("sliding_window") if "sliding_window" in config.data else 4096
    windows = [window] * config.integer("num_hidden_layers")
    return decoder_config("MistralForCausalLM", config, layers=layer_configs(config, windows))


FAMILIES = (Family(architecture="MistralForCausalLM", read_config=read_config),)
