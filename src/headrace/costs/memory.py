"""Bytes a model keeps in memory."""

from headrace.config import ModelConfig


def kv_block_bytes(config: ModelConfig, block_size: int, element_bytes: int, num_layers: int | None = None) -> int:
    """Keys and values of one block on all layers: 2 * layers * block_size * num_kv_heads * head_dim * element_bytes."""
    layers = config.num_hidden_layers if num_layers is None else num_layers
    attention = config.attention
    return 2 * layers * block_size * attention.num_kv_heads * attention.head_dim * element_bytes


def num_blocks_for(num_tokens: int, block_size: int) -> int:
    """Blocks that hold `num_tokens` tokens of one sequence."""
    return -(-num_tokens // block_size)
