"""Typed reading of config.json, as transformers 4 and 5 write it."""

from collections.abc import Mapping
from typing import Any

from headrace.config import Activation, RopeConfig, RopeScaling, RopeType
from headrace.errors import CheckpointError, nearest_name

_ACTIVATIONS = {
    "silu": Activation.SILU,
    "swish": Activation.SILU,
    "gelu": Activation.GELU,
    "gelu_new": Activation.GELU_TANH,
    "gelu_fast": Activation.GELU_TANH,
    "gelu_pytorch_tanh": Activation.GELU_TANH,
    "relu": Activation.RELU,
}


class HfConfig:
    """A config.json. A key that is absent or null takes the default; without a default it is an error that names it."""

    def __init__(self, data: Mapping[str, Any]) -> None:
        self.data = data

    def integer(self, key: str, default: int | None = None) -> int:
        return int(self._read(key, (int,), default))

    def number(self, key: str, default: float | None = None) -> float:
        return float(self._read(key, (int, float), default))

    def flag(self, key: str, default: bool) -> bool:
        value = self.data.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise CheckpointError(f"config.json: {key} is {value!r}; it must be true or false")
        return value

    def optional_integer(self, key: str) -> int | None:
        return None if self.data.get(key) is None else self.integer(key)

    def optional_number(self, key: str) -> float | None:
        return None if self.data.get(key) is None else self.number(key)

    def strings(self, key: str) -> list[str] | None:
        value = self.data.get(key)
        if value is None:
            return None
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise CheckpointError(f"config.json: {key} is {value!r}; it must be a list of strings")
        return value

    def activation(self, key: str, default: str | None = None) -> Activation:
        name = self.data.get(key, default)
        if name not in _ACTIVATIONS:
            raise CheckpointError(
                f"config.json: {key} '{name}' is not a supported activation; {nearest_name(str(name), _ACTIVATIONS)}"
            )
        return _ACTIVATIONS[name]

    def refuse(self, key: str, *allowed: Any) -> None:
        """Raise if a setting that Headrace does not implement is switched on."""
        value = self.data.get(key)
        if value not in (None, *allowed):
            raise CheckpointError(f"config.json: {key} = {value!r} is not supported; allowed: {allowed or (None,)}")

    def head_dim(self) -> int:
        explicit = self.optional_integer("head_dim")
        return explicit or self.integer("hidden_size") // self.integer("num_attention_heads")

    def num_kv_heads(self) -> int:
        return self.integer("num_key_value_heads", self.integer("num_attention_heads"))

    def layer_types(self, default: list[str]) -> list[str]:
        """ "full_attention" or "sliding_attention" for each layer."""
        types = self.strings("layer_types") or default
        if len(types) != len(default):
            raise CheckpointError(f"config.json: layer_types has {len(types)} entries for {len(default)} layers")
        for name in types:
            if name not in ("full_attention", "sliding_attention"):
                raise CheckpointError(
                    f"config.json: layer type '{name}' is not supported; allowed: full_attention, sliding_attention"
                )
        return types

    def rope(
        self,
        head_dim: int,
        *,
        layer_type: str | None = None,
        theta_key: str = "rope_theta",
        default_theta: float = 10000.0,
        partial: float = 1.0,
        interleaved: bool = False,
    ) -> RopeConfig:
        """Rotary settings from `rope_parameters` (transformers 5) or `rope_scaling` and `rope_theta` (transformers 4).

        layer_type picks the entry where rope_parameters holds one per layer type (Gemma 3).
        """
        parameters = self._rope_parameters(layer_type)
        theta = parameters.get("rope_theta") or self.number(theta_key, default_theta)
        fraction = parameters.get("partial_rotary_factor") or self.number("partial_rotary_factor", partial)
        return RopeConfig(
            rotary_dim=int(head_dim * fraction),
            theta=float(theta),
            interleaved=interleaved,
            scaling=self._rope_scaling(parameters),
        )

    def _rope_parameters(self, layer_type: str | None) -> Mapping[str, Any]:
        parameters = self.data.get("rope_parameters") or self.data.get("rope_scaling") or {}
        if layer_type is not None and layer_type in parameters:
            parameters = parameters[layer_type] or {}
        if not isinstance(parameters, Mapping):
            raise CheckpointError(f"config.json: rope parameters are {parameters!r}; they must be an object")
        return parameters

    def _rope_scaling(self, parameters: Mapping[str, Any]) -> RopeScaling | None:
        name = parameters.get("rope_type") or parameters.get("type") or "default"
        if name == "default":
            return None
        types = {rope_type.value: rope_type for rope_type in RopeType}
        if name not in types:
            raise CheckpointError(f"config.json: rope type '{name}' is not supported; {nearest_name(name, types)}")
        original = parameters.get("original_max_position_embeddings") or self.integer("max_position_embeddings")
        factor = parameters.get("factor") or self.integer("max_position_embeddings") / original
        known = RopeScaling.__dataclass_fields__.keys() - {"rope_type", "factor", "original_max_position_embeddings"}
        given = {key: parameters[key] for key in known if parameters.get(key) is not None}
        return RopeScaling(
            rope_type=types[name], factor=float(factor), original_max_position_embeddings=int(original), **given
        )

    def _read(self, key: str, types: tuple[type, ...], default: Any) -> Any:
        value = self.data.get(key)
        value = default if value is None else value
        if value is None:
            raise CheckpointError(f"config.json has no '{key}'")
        if not isinstance(value, types) or isinstance(value, bool):
            raise CheckpointError(f"config.json: {key} is {value!r}; it must be a number")
        return value
