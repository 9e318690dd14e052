"""Configurations from flat settings, in the words that callers of Python and of the command line use."""

from enum import Enum
from typing import Any, TypeVar

from headrace.config.device import Device
from headrace.config.engine import (
    CacheConfig,
    DataflowChoice,
    Dtype,
    EngineConfig,
    KvCacheDtype,
    LoadConfig,
    Quantize,
    SchedulerConfig,
    Softmax,
)
from headrace.config.parallel import AllReduceDtype, KvSharding, ParallelConfig, Transport
from headrace.errors import ConfigError, nearest_name

T = TypeVar("T")

_PARTS: dict[str, type[Any]] = {
    "load": LoadConfig,
    "cache": CacheConfig,
    "scheduler": SchedulerConfig,
    "parallel": ParallelConfig,
}

_CONFIGS: tuple[type[Any], ...] = (EngineConfig, *_PARTS.values())

SETTINGS = tuple(name for config in _CONFIGS for name in config.__dataclass_fields__ if name not in _PARTS)
"""Fields of `EngineConfig` and of its parts."""

_WORDS: dict[str, type[Enum]] = {
    "dtype": Dtype,
    "quantize": Quantize,
    "kv_cache_dtype": KvCacheDtype,
    "transport": Transport,
    "all_reduce_dtype": AllReduceDtype,
    "kv_sharding": KvSharding,
    "softmax": Softmax,
    "dataflow": DataflowChoice,
}


def engine_config(**settings: Any) -> EngineConfig:
    """Hand each setting to the config that has a field of its name.

    Raises:
        ConfigError: a setting that cannot be used, or that no config has.
    """
    for name in settings:
        if name not in SETTINGS:
            raise ConfigError(f"LLM has no setting '{name}'; {nearest_name(name, SETTINGS)}")
    parts = {name: _config(part, settings) for name, part in _PARTS.items()}
    return EngineConfig(**parts, **_fields(EngineConfig, settings))


def parallel_config(**settings: Any) -> ParallelConfig:
    """That of an engine with these settings, among others."""
    return _config(ParallelConfig, settings)


def _config(kind: type[T], settings: dict[str, Any]) -> T:
    return kind(**_fields(kind, settings))


def _fields(kind: Any, settings: dict[str, Any]) -> dict[str, Any]:
    return {name: _value(name, settings[name]) for name in kind.__dataclass_fields__ if name in settings}


def _value(name: str, given: Any) -> Any:
    if name == "device":
        return Device.parse(str(given))
    if name == "pipeline_layers":
        return None if given is None else tuple(given)
    if name not in _WORDS:
        return given
    words = [member.value for member in _WORDS[name]]
    if given not in words:
        raise ConfigError(f"{name} is '{given}'; {nearest_name(str(given), words)}")
    return _WORDS[name](given)
