"""What the KV cache of one layer must hold, and what a block of it takes."""

from headrace.config import CacheConfig, KvCacheDtype, KvCacheFormat, ModelConfig
from headrace.kernels import Kernels, KvCacheSpec
from headrace.models.loading import WeightFormats


def resolve_kv_cache_format(config: CacheConfig, formats: WeightFormats) -> KvCacheFormat:
    if config.kv_cache_dtype is KvCacheDtype.AUTO:
        return KvCacheFormat(formats.dense.value)
    return KvCacheFormat(config.kv_cache_dtype.value)


def kv_cache_spec(model: ModelConfig, cache_format: KvCacheFormat, *, num_blocks: int, block_size: int) -> KvCacheSpec:
    return KvCacheSpec(
        cache_format=cache_format,
        num_blocks=num_blocks,
        block_size=block_size,
        num_kv_heads=model.attention.num_kv_heads,
        head_dim=model.attention.head_dim,
    )


def kv_block_bytes(kernels: Kernels, model: ModelConfig, cache_format: KvCacheFormat, block_size: int) -> int:
    """Of one block on all layers, padding included."""
    spec = kv_cache_spec(model, cache_format, num_blocks=1, block_size=block_size)
    return model.num_hidden_layers * kernels.kv_cache_num_bytes(spec)
