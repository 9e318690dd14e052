"""One op, one name, one definition: `reference` defines, other implementations prove that speed changed nothing.

Layers get a `Kernels` from `dispatch.resolve_kernels` and call ops through it; they never import an implementation.
"""

from headrace.kernels.dispatch import KernelChoice, Kernels, OpChoice, kernel_choice_from, resolve_kernels
from headrace.kernels.kv_cache import (
    NOT_STORED,
    DenseKvCache,
    KvCache,
    KvCacheSpec,
    PackedKvCache,
    QuantizedKvCache,
    SoftmaxCounts,
)
from headrace.kernels.ops import AttentionShare, AttentionSpec, MixtureSpec, NativeStream, Recording, SoftmaxSpec
from headrace.kernels.weights import (
    QUANTIZATION_GROUP_SIZE,
    BlockedWeight,
    DenseWeight,
    Experts,
    PackedWeight,
    QuantizedWeight,
    Weight,
    WeightBuilder,
    quantized_columns,
)

__all__ = [
    "NOT_STORED",
    "QUANTIZATION_GROUP_SIZE",
    "AttentionShare",
    "AttentionSpec",
    "BlockedWeight",
    "DenseKvCache",
    "DenseWeight",
    "Experts",
    "KernelChoice",
    "Kernels",
    "KvCache",
    "KvCacheSpec",
    "MixtureSpec",
    "NativeStream",
    "OpChoice",
    "PackedKvCache",
    "PackedWeight",
    "QuantizedKvCache",
    "QuantizedWeight",
    "Recording",
    "SoftmaxCounts",
    "SoftmaxSpec",
    "Weight",
    "WeightBuilder",
    "kernel_choice_from",
    "quantized_columns",
    "resolve_kernels",
]
