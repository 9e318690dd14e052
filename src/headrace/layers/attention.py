"""Multi-head attention with grouped KV heads over the paged cache."""

from collections.abc import Iterator

import torch
from torch import Tensor

from headrace.batch import ForwardBatch
from headrace.config import KvSharding, LayerConfig, ModelConfig
from headrace.costs.sharding import check_heads_divide, shard_kv_heads, shard_range
from headrace.kernels import AttentionSpec, KvCache, SoftmaxSpec
from headrace.layers.context import LayerContext
from headrace.layers.context_attention import make_context_attention
from headrace.layers.linear import ColumnParallelLinear, OutputPart, RowParallelLinear
from headrace.layers.norm import RmsNorm
from headrace.layers.parameter import Parameter


class Attention:
    """o_proj(attention(rotary(q), rotary(k), v)), with q, k and v from one fused projection.

    Query heads are split over the group; KV heads too, or repeated where there are more ranks than KV heads. What ranks
    with the same KV head hold of its contexts, and which columns of o_proj, is `KvSharding`.

    site, context_site: those of the output's all-reduce and of the exchanges over shared contexts in the ledger.
    """

    def __init__(
        self,
        prefix: str,
        config: ModelConfig,
        layer: LayerConfig,
        softmax: SoftmaxSpec,
        context: LayerContext,
        *,
        site: str,
        context_site: str,
    ) -> None:
        attention, group = config.attention, context.tp_group
        check_heads_divide(attention.num_heads, attention.num_kv_heads, group.world_size)
        heads = shard_range(attention.num_heads, group.rank, group.world_size)
        kv_heads = shard_kv_heads(attention.num_kv_heads, group.rank, group.world_size)
        self._kernels = context.kernels
        self._attend = make_context_attention(context, context_site)
        self._head_dim = attention.head_dim
        self._interleaved = layer.rope.interleaved if layer.rope else False
        self._spec = AttentionSpec(
            softmax_scale=attention.softmax_scale,
            sliding_window=layer.sliding_window,
            logit_soft_cap=attention.logit_soft_cap,
            softmax=softmax,
        )
        self._split = [len(heads), len(kv_heads), len(kv_heads)]
        self.qkv = ColumnParallelLinear(
            [
                self._part(f"{prefix}.q_proj", attention.num_heads, heads),
                self._part(f"{prefix}.k_proj", attention.num_kv_heads, kv_heads),
                self._part(f"{prefix}.v_proj", attention.num_kv_heads, kv_heads),
            ],
            config.hidden_size,
            context,
            has_bias=attention.qkv_bias,
        )
        self.output = RowParallelLinear(
            f"{prefix}.o_proj",
            config.hidden_size,
            attention.num_heads * attention.head_dim,
            context,
            columns=self._rows(_output_heads(heads, kv_heads, attention.num_heads // attention.num_kv_heads, context)),
            site=site,
            has_bias=attention.output_bias,
        )
        self.q_norm = RmsNorm(f"{prefix}.q_norm", self._head_dim, config.norm, context) if attention.qk_norm else None
        self.k_norm = RmsNorm(f"{prefix}.k_norm", self._head_dim, config.norm, context) if attention.qk_norm else None

    def __call__(
        self, hidden_states: Tensor, batch: ForwardBatch, kv_cache: KvCache, cos_sin: tuple[Tensor, Tensor] | None
    ) -> Tensor:
        """Shapes: hidden_states [num_tokens, hidden_size], returned alike; kv_cache: this layer's."""
        heads = self.qkv(hidden_states).view(len(hidden_states), -1, self._head_dim)
        query, key, value = torch.split(heads, self._split, dim=1)
        if self.q_norm is not None and self.k_norm is not None:
            query, key = self.q_norm(query), self.k_norm(key)
        self._kernels.rotary_store_kv_(
            query, key, value, kv_cache, batch.slot_mapping, cos_sin, interleaved=self._interleaved
        )
        return self.output(self._attend(query, batch, kv_cache, self._spec).flatten(1))

    def parameters(self) -> Iterator[Parameter]:
        yield from self.qkv.parameters()
        for norm in (self.q_norm, self.k_norm):
            if norm is not None:
                yield from norm.parameters()
        yield from self.output.parameters()

    def _part(self, name: str, num_heads: int, heads: range) -> OutputPart:
        return OutputPart(name=name, size=num_heads * self._head_dim, rows=self._rows(heads))

    def _rows(self, heads: range) -> range:
        return range(heads.start * self._head_dim, heads.stop * self._head_dim)


def _output_heads(heads: range, kv_heads: range, heads_per_kv_head: int, context: LayerContext) -> range:
    """Heads whose part of the output projection this rank holds: its own, or all that share its KV head."""
    if context.parallel.kv_sharding is KvSharding.SEQUENCE_FUSED and context.kv_group.world_size > 1:
        return range(kv_heads.start * heads_per_kv_head, kv_heads.stop * heads_per_kv_head)
    return heads
