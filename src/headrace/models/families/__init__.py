"""What each model family calls things: config.json keys and tensor names. No torch.

To add a family, write one file that reads its config.json into a `ModelConfig` and says where each tensor lies, and
list it in FAMILIES.
"""

from collections.abc import Mapping
from typing import Any

from headrace.config import ModelConfig
from headrace.errors import CheckpointError, nearest_name
from headrace.models.families import chatglm, gemma, glm, llama, mistral, mixtral, opt, qwen
from headrace.models.families.family import Family, Location
from headrace.models.families.hf_config import HfConfig

FAMILIES: tuple[Family, ...] = (
    *llama.FAMILIES,
    *mistral.FAMILIES,
    *qwen.FAMILIES,
    *opt.FAMILIES,
    *chatglm.FAMILIES,
    *glm.FAMILIES,
    *gemma.FAMILIES,
    *mixtral.FAMILIES,
)

_BY_ARCHITECTURE = {family.architecture: family for family in FAMILIES}


def find_family(architecture: str) -> Family:
    """The family of a config.json's `architectures` entry.

    Raises:
        CheckpointError: an architecture Headrace does not know; names the nearest one, or all.
    """
    if architecture not in _BY_ARCHITECTURE:
        hint = nearest_name(architecture, _BY_ARCHITECTURE, cutoff=0.9)  # most of any name is ForCausalLM
        raise CheckpointError(f"architecture '{architecture}' is not supported; {hint}")
    return _BY_ARCHITECTURE[architecture]


def read_model_config(config: Mapping[str, Any]) -> tuple[Family, ModelConfig]:
    """The family and model described by a config.json.

    Raises:
        CheckpointError: no or unknown architecture, a missing key, or a value that cannot be used.
    """
    architectures = config.get("architectures")
    if not isinstance(architectures, list) or len(architectures) != 1 or not isinstance(architectures[0], str):
        raise CheckpointError(f"config.json names {architectures!r} as architectures; it must name exactly one")
    family = find_family(architectures[0])
    return family, family.read_config(HfConfig(config))


__all__ = ["FAMILIES", "Family", "HfConfig", "Location", "find_family", "read_model_config"]
