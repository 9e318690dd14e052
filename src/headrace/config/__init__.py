"""Frozen, validated settings; no torch, so that planners and the command line can read them for free."""

from headrace.config.device import Device, DeviceKind
from headrace.config.engine import (
    CacheConfig,
    DataflowChoice,
    Dtype,
    EngineConfig,
    KvCacheDtype,
    KvCacheFormat,
    LoadConfig,
    Quantize,
    SchedulerConfig,
    Softmax,
    SoftmaxScheme,
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
from headrace.config.parallel import AllReduceDtype, KvSharding, ParallelConfig, Transport
from headrace.config.pooling import Pooling, PoolingParams
from headrace.config.sampling import SamplingParams
from headrace.config.structured_outputs import StructuredOutputs

__all__ = [
    "Activation",
    "AllReduceDtype",
    "AttentionConfig",
    "CacheConfig",
    "DataflowChoice",
    "Device",
    "DeviceKind",
    "Dtype",
    "EmbeddingConfig",
    "EngineConfig",
    "KvCacheDtype",
    "KvCacheFormat",
    "KvSharding",
    "LayerConfig",
    "LoadConfig",
    "MlpConfig",
    "ModelConfig",
    "MoeConfig",
    "NormConfig",
    "NormKind",
    "NormPlacement",
    "ParallelConfig",
    "Pooling",
    "PoolingParams",
    "Quantize",
    "RopeConfig",
    "RopeScaling",
    "RopeType",
    "SamplingParams",
    "SchedulerConfig",
    "Softmax",
    "SoftmaxScheme",
    "StructuredOutputs",
    "Transport",
    "WeightFormat",
]
