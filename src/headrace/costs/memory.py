"""Bytes a model keeps in memory."""

from headrace.config import KvCacheFormat, ModelConfig

_ELEMENT_BYTES = {KvCacheFormat.FLOAT32: 4, KvCacheFormat.BFLOAT16: 2, KvCacheFormat.INT8: 1}
_SCALE_BYTES = {KvCacheFormat.FLOAT32: 0, KvCacheFormat.BFLOAT16: 0, KvCacheFormat.INT8: 4}


def kv_token_bytes(config: ModelConfig, cache_format: KvCacheFormat, num_layers: int | None = None) -> int:
    """Keys and values of one token on all layers: 2 * layers * num_kv_heads * (head_dim * element_bytes + scale_bytes).

    What attention reads. Kernels may take more memory, for padding: `Kernels.kv_cache_num_bytes`.
    """
    layers = config.num_hidden_layers if num_layers is None else num_layers
    attention = config.attention
    head_bytes = attention.head_dim * _ELEMENT_BYTES[cache_format] + _SCALE_BYTES[cache_format]
    return 2 * layers * attention.num_kv_heads * head_bytes


def num_blocks_for(num_tokens: int, block_size: int) -> int:
    """Blocks that hold `num_tokens` tokens of one sequence."""
    return -(-num_tokens // block_size)
