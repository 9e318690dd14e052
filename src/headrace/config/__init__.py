"""Frozen, validated settings; no torch, so that planners and the command line can read them for free."""

from headrace.config.engine import (
    CacheConfig,
    DataflowChoice,
    Dtype,
    EngineConfig,
    LoadConfig,
    Quantize,
    SchedulerConfig,
    WeightFormat,
)
from headrace.config.model import (
    Activation,
    AttentionConfig,
    EmbeddingConfig,
    LayerConfig,
    MlpConfig,
    ModelConfig,
    MoeConfig,
    NormConfig,
    NormKind,
    NormPlacement,
    RopeConfig,
    RopeScaling,
    RopeType,
)
from headrace.config.sampling import SamplingParams

__all__ = [
    "Activation",
    "AttentionConfig",
    "CacheConfig",
    "DataflowChoice",
    "Dtype",
    "EmbeddingConfig",
    "EngineConfig",
    "LayerConfig",
    "LoadConfig",
    "MlpConfig",
    "ModelConfig",
    "MoeConfig",
    "NormConfig",
    "NormKind",
    "NormPlacement",
    "Quantize",
    "RopeConfig",
    "RopeScaling",
    "RopeType",
    "SamplingParams",
    "SchedulerConfig",
    "WeightFormat",
]
