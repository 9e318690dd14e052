"""Typed reading of config.json, as transformers 4 and 5 write it."""

import sys
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

_MAX_INTEGER = 2**31 - 1
_YARN_NUMBERS = ("beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim")


class HfConfig:
    """A config.json. A key that is absent or null takes the default; without a default it is an error that names it."""

    def __init__(self, data: Mapping[str, Any]) -> None:
        self.data = data

    def integer(self, key: str, default: int | None = None, *, minimum: int = 1) -> int:
        value = self._read(key, (int,), default)
        if not minimum <= value <= _MAX_INTEGER:
            raise CheckpointError(f"config.json: {key} is {value}; allowed: {minimum} to {_MAX_INTEGER}")
        return int(value)

    def number(self, key: str, default: float | None = None) -> float:
        """Every number Headrace reads is a size, a scale or a divisor."""
        value = self._read(key, (int, float), default)
        if not 0 < value <= sys.float_info.max:
            raise CheckpointError(f"config.json: {key} is {value}; it must be above 0 and finite")
        return float(value)

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

    def integers(self, key: str) -> list[int]:
        value = self.data.get(key)
        if value is None:
            return []
        if not isinstance(value, list) or not all(isinstance(item, int) for item in value):
            raise CheckpointError(f"config.json: {key} is {value!r}; it must be a list of integers")
        return value

    def activation(self, key: str, default: str | None = None) -> Activation:
        name = self.data.get(key)
        name = default if name is None else name
        if not isinstance(name, str) or name not in _ACTIVATIONS:
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
        if explicit is not None:
            return explicit
        hidden_size, num_heads = self.integer("hidden_size"), self.integer("num_attention_heads")
        if hidden_size % num_heads:
            raise CheckpointError(
                f"config.json: hidden_size {hidden_size} is not a multiple of num_attention_heads {num_heads}, "
                "and there is no head_dim"
            )
        return hidden_size // num_heads

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
        default_theta: float = 10000.0,
        partial: float = 1.0,
        interleaved: bool = False,
    ) -> RopeConfig:
        """Rotary settings from `rope_parameters` (transformers 5) or `rope_scaling` and `rope_theta` (transformers 4).

        layer_type picks the entry where rope_parameters holds one per layer type (Gemma 3).
        """
        parameters = self._rope_parameters(layer_type)
        theta = parameters.optional_number("rope_theta") or self.number("rope_theta", default_theta)
        fraction = parameters.optional_number("partial_rotary_factor") or self.number("partial_rotary_factor", partial)
        if theta <= 1 or fraction > 1:
            raise CheckpointError(
                f"config.json: rope_theta is {theta}, partial_rotary_factor {fraction}; "
                "allowed: above 1, and above 0 up to 1"
            )
        return RopeConfig(
            rotary_dim=int(head_dim * fraction),
            theta=theta,
            interleaved=interleaved,
            scaling=self._rope_scaling(parameters),
        )

    def _rope_parameters(self, layer_type: str | None) -> "HfConfig":
        parameters = self.data.get("rope_parameters") or self.data.get("rope_scaling") or {}
        if layer_type is not None and isinstance(parameters, Mapping) and layer_type in parameters:
            parameters = parameters[layer_type] or {}
        if not isinstance(parameters, Mapping):
            raise CheckpointError(f"config.json: rope parameters are {parameters!r}; they must be an object")
        return HfConfig(parameters)

    def _rope_scaling(self, parameters: "HfConfig") -> RopeScaling | None:
        name = parameters.data.get("rope_type") or parameters.data.get("type") or "default"
        if name == "default":
            return None
        types = {rope_type.value: rope_type for rope_type in RopeType}
        if not isinstance(name, str) or name not in types:
            raise CheckpointError(f"config.json: rope type '{name}' is not supported; {nearest_name(str(name), types)}")
        length = self.integer("max_position_embeddings")
        original = parameters.integer("original_max_position_embeddings", length)
        return RopeScaling(
            rope_type=types[name],
            factor=parameters.number("factor", length / original),
            # transformers measures dynamic stretching from max_position_embeddings, whatever else is given.
            original_max_position_embeddings=length if types[name] is RopeType.DYNAMIC else original,
            **_type_settings(types[name], parameters),
        )

    def _read(self, key: str, types: tuple[type, ...], default: Any) -> Any:
        value = self.data.get(key)
        value = default if value is None else value
        if value is None:
            raise CheckpointError(f"config.json has no '{key}'")
        if not isinstance(value, types) or isinstance(value, bool):
            raise CheckpointError(f"config.json: {key} is {value!r}; it must be a number")
        return value


def _type_settings(rope_type: RopeType, parameters: HfConfig) -> dict[str, Any]:
    """The settings that one rope type has to itself, as far as they are given."""
    match rope_type:
        case RopeType.LLAMA3:
            names = [name for name in ("low_freq_factor", "high_freq_factor") if parameters.data.get(name) is not None]
        case RopeType.YARN:
            # A zero is as good as absent, as in transformers.
            names = [name for name in _YARN_NUMBERS if parameters.data.get(name)]
        case _:
            names = []
    settings: dict[str, Any] = {name: parameters.number(name) for name in names}
    if rope_type is RopeType.YARN:
        settings["truncate"] = parameters.flag("truncate", True)
    if rope_type is RopeType.LLAMA3 and settings.get("low_freq_factor", 1.0) >= settings.get("high_freq_factor", 4.0):
        raise CheckpointError("config.json: low_freq_factor must be below high_freq_factor")
    return settings
