"""What attention is measured on: contexts in a paged cache, and their last tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from headrace.bench.kernels import ModelShape
from headrace.config import KvCacheFormat
from headrace.kernels import Kernels, KvCache, KvCacheSpec

BLOCK_SIZE = 16


@dataclass(frozen=True, kw_only=True)
class Case:
    """num_new: the last tokens of each context, which attend to all before them and to themselves."""

    shape: ModelShape
    heads: str
    batch: int
    context_len: int
    num_new: int

    @property
    def phase(self) -> str:
        if self.num_new == 1:
            return "decode"
        return "prefill" if self.num_new == self.context_len else "chunk"

    @property
    def tokens(self) -> int | str:
        """As tables name it."""
        return f"{self.num_new} of {self.context_len}" if self.phase == "chunk" else self.context_len

    @property
    def num_blocks(self) -> int:
        """Of one sequence."""
        return -(-self.context_len // BLOCK_SIZE)

    @property
    def num_bytes(self) -> int:
        """Keys and values that are seen, in 2 bytes an entry."""
        return 4 * self.batch * self.context_len * self.shape.num_kv_heads * self.shape.head_dim

    @property
    def num_ops(self) -> int:
        pairs = self.num_new * (2 * self.context_len - self.num_new + 1) // 2
        return 4 * self.batch * self.shape.num_heads * self.shape.head_dim * pairs

    def cache_spec(self, cache_format: KvCacheFormat) -> KvCacheSpec:
        return KvCacheSpec(
            cache_format=cache_format,
            num_blocks=self.batch * self.num_blocks,
            block_size=BLOCK_SIZE,
            num_kv_heads=self.shape.num_kv_heads,
            head_dim=self.shape.head_dim,
        )


@dataclass(frozen=True, kw_only=True)
class Paged:
    """What an attention op reads. Blocks lie in no order, as in an engine that has run for a while."""

    query: Tensor
    caches: list[KvCache]
    tables: Tensor
    context_lens: Tensor
    cu_seqlens_q: Tensor

    def keys_and_values(self, kernels: Kernels, cache: KvCache, sequence: int) -> tuple[Tensor, Tensor]:
        """Of one sequence, from one of the caches: two tensors [context_len, num_kv_heads, head_dim] float32."""
        positions = torch.arange(int(self.context_lens[sequence]), device=self.tables.device)
        slots = self.tables[sequence].long()[positions // BLOCK_SIZE] * BLOCK_SIZE + positions % BLOCK_SIZE
        return kernels.read_kv(cache, slots)
