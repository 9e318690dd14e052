"""The two questions a family answers."""

from collections.abc import Callable
from dataclasses import dataclass

from headrace.config import ModelConfig
from headrace.models.families.hf_config import HfConfig


@dataclass(frozen=True, kw_only=True)
class Location:
    """Where a tensor lies in a checkpoint: a tensor's name, and the row at which ours starts within it."""

    name: str
    row_offset: int = 0


def same_name(name: str, config: ModelConfig) -> Location:  # noqa: ARG001
    return Location(name=name)


@dataclass(frozen=True, kw_only=True)
class Family:
    """One entry of config.json's `architectures`.

    read_config: config.json to `ModelConfig`.
    locate: Headrace's tensor name to the checkpoint's. Headrace names tensors as Llama does; beside Llama's there are
        `q_norm` and `k_norm` (as Qwen3), `mlp.gate` and `mlp.experts.N` (Qwen3-MoE), `post_self_attn_layernorm` and
        `post_mlp_layernorm` (GLM-4-0414), `embed_positions`, `project_in` and `project_out` (OPT).
    ignored: regular expressions for tensors of the checkpoint that carry no weights Headrace reads.
    """

    architecture: str
    read_config: Callable[[HfConfig], ModelConfig]
    locate: Callable[[str, ModelConfig], Location] = same_name
    ignored: tuple[str, ...] = (r".*rotary_emb\.inv_freq",)
