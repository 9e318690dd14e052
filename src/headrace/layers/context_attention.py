"""Attention over a context that lies whole on this rank, or in shares on the ranks that have its KV head."""

from typing import Protocol

from torch import Tensor

from headrace.batch import ForwardBatch
from headrace.config import KvSharding
from headrace.kernels import AttentionSpec, Kernels, KvCache
from headrace.layers.context import LayerContext
from headrace.parallel.group import Group


class ContextAttention(Protocol):
    def __call__(self, query: Tensor, batch: ForwardBatch, kv_cache: KvCache, spec: AttentionSpec) -> Tensor:
        """
        Shapes:
            query:   [num_tokens, local_num_heads, head_dim]
            returns: the same, or that of all heads of the KV group, of which the sum over the group is meant
        """
        ...


def make_context_attention(context: LayerContext, site: str) -> ContextAttention:
    """site: what ranks exchange that hold shares of one KV head's context, as the ledger counts it."""
    sharding, group = context.parallel.kv_sharding, context.kv_group
    if not sharding.splits_contexts or group.world_size == 1:
        return WholeContext(context.kernels)
    return SharedContext(context.kernels, group, site, is_scattered=sharding is KvSharding.SEQUENCE)


class WholeContext:
    """This rank has all that its query heads see."""

    def __init__(self, kernels: Kernels) -> None:
        self._attention = kernels.attention

    def __call__(self, query: Tensor, batch: ForwardBatch, kv_cache: KvCache, spec: AttentionSpec) -> Tensor:
        return self._attention(query, kv_cache, batch.block_tables, batch.context_lens, batch.cu_seqlens_q, spec)


class SharedContext:
    """The group's ranks have the same KV head, and each some blocks of every context.

    Queries of the group are gathered, each rank attends all of them over the blocks it has, and denominators and
    references of the shares are gathered, from which each rank knows what its numerators weigh in the whole. What it
    then adds, numerators by weight, is either scattered at once (is_scattered: each rank gets the sum for its own
    heads), or left for a later sum over ranks.

    References travel with the denominators in every softmax scheme, 4 more bytes for a head: rows that the unified
    maximum did not suit refer to their own, and no rank can know of another's.

    Bytes that each of r ranks sends for a token, with direct exchange, b bytes for an element, h local heads of d:
        queries (r - 1) h d b; denominators and references (r - 1) r h 8; if scattered, numerators (r - 1) h d b.
    """

    def __init__(self, kernels: Kernels, group: Group, site: str, *, is_scattered: bool) -> None:
        self._kernels = kernels
        self._group = group
        self._site = site
        self._is_scattered = is_scattered

    def __call__(self, query: Tensor, batch: ForwardBatch, kv_cache: KvCache, spec: AttentionSpec) -> Tensor:
        assert batch.owned_blocks is not None, "the batch was built for whole contexts"
        kernels, group, site = self._kernels, self._group, self._site
        if not query.is_contiguous():
            query = kernels.join_heads([query])
        share = kernels.attention_share(
            kernels.join_heads(group.all_gather(query, site)),
            kv_cache,
            batch.block_tables,
            batch.context_lens,
            batch.cu_seqlens_q,
            batch.owned_blocks,
            spec,
        )
        normalizers = group.all_gather(share.normalizers, site)
        num_parts = group.world_size if self._is_scattered else 1
        weighed = kernels.weigh_share(share, normalizers, group.rank, dtype=query.dtype, num_parts=num_parts)
        return group.reduce_scatter(weighed, site) if self._is_scattered else weighed[0]
