"""The tensors behind the block ids."""

import torch
from torch import Tensor

from headrace.config import ModelConfig


class KvPool:
    """Keys and values of every block, one tensor per local layer.

    Memory is claimed from the system as blocks are first written, so an idle engine holds little of its budget.

    Shapes:
        layers[i]: [2, num_blocks, block_size, num_kv_heads, head_dim]
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        num_layers: int,
        num_kv_heads: int,
        num_blocks: int,
        block_size: int,
        dtype: torch.dtype,
    ) -> None:
        shape = (2, num_blocks, block_size, num_kv_heads, config.attention.head_dim)
        self.block_size = block_size
        self.layers: list[Tensor] = [torch.empty(shape, dtype=dtype) for _ in range(num_layers)]
