"""The decoder that every family is an instance of."""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from headrace.batch import ForwardBatch
from headrace.config import LayerConfig, ModelConfig, NormPlacement, RopeConfig
from headrace.kernels import KvCache
from headrace.layers.attention import Attention
from headrace.layers.context import LayerContext
from headrace.layers.embedding import LmHead, TokenEmbedding
from headrace.layers.mlp import make_mlp
from headrace.layers.norm import make_norm
from headrace.layers.parameter import Parameter
from headrace.layers.rotary import RotaryTable

Sublayer = Callable[[Tensor], Tensor]


class Residual:
    """A sublayer and its normalizations: see `NormPlacement` for the three forms."""

    def __init__(self, norm_name: str, post_norm_name: str, config: ModelConfig, context: LayerContext) -> None:
        self.placement = config.norm.placement
        self.norm = make_norm(norm_name, config.hidden_size, config.norm, context)
        self.post_norm = (
            make_norm(post_norm_name, config.hidden_size, config.norm, context)
            if self.placement is NormPlacement.SANDWICH
            else None
        )

    def __call__(self, hidden_states: Tensor, sublayer: Sublayer) -> Tensor:
        if self.placement is NormPlacement.POST:
            return self.norm(hidden_states + sublayer(hidden_states))
        update = sublayer(self.norm(hidden_states))
        return hidden_states + (update if self.post_norm is None else self.post_norm(update))

    def parameters(self) -> Iterator[Parameter]:
        yield from self.norm.parameters()
        if self.post_norm is not None:
            yield from self.post_norm.parameters()


class DecoderLayer:
    """h = residual(h, attention); h = residual(h, mlp)."""

    def __init__(self, index: int, config: ModelConfig, context: LayerContext) -> None:
        prefix = f"model.layers.{index}"
        layer: LayerConfig = config.layers[index]
        self.rope = layer.rope
        self.attention = Attention(f"{prefix}.self_attn", config, layer, context)
        self.mlp = make_mlp(f"{prefix}.mlp", config, layer.moe, context)
        self.attention_residual = Residual(
            f"{prefix}.input_layernorm", f"{prefix}.post_self_attn_layernorm", config, context
        )
        self.mlp_residual = Residual(
            f"{prefix}.post_attention_layernorm", f"{prefix}.post_mlp_layernorm", config, context
        )

    def __call__(
        self, hidden_states: Tensor, batch: ForwardBatch, kv_cache: KvCache, cos_sin: tuple[Tensor, Tensor] | None
    ) -> Tensor:
        hidden_states = self.attention_residual(hidden_states, lambda x: self.attention(x, batch, kv_cache, cos_sin))
        return self.mlp_residual(hidden_states, self.mlp)

    def parameters(self) -> Iterator[Parameter]:
        yield from self.attention_residual.parameters()
        yield from self.attention.parameters()
        yield from self.mlp_residual.parameters()
        yield from self.mlp.parameters()


class Decoder:
    """Token ids to logits, over a KV cache.

    layer_range: the layers of this pipeline stage. The first stage embeds tokens, the last one norms and has the head;
    with one stage it does both.
    max_model_len: the longest sequence that will run, which fixes dynamic rotary frequencies.
    """

    def __init__(
        self,
        config: ModelConfig,
        context: LayerContext,
        *,
        dtype: torch.dtype,
        max_model_len: int,
        layer_range: range | None = None,
    ) -> None:
        self.config = config
        self.kernels = context.kernels
        self.layer_range = range(config.num_hidden_layers) if layer_range is None else layer_range
        is_first, is_last = self.layer_range.start == 0, self.layer_range.stop == config.num_hidden_layers
        self.embedding = TokenEmbedding(config, context, dtype) if is_first else None
        self.layers = [DecoderLayer(i, config, context) for i in self.layer_range]
        has_norm = is_last and config.norm.has_final_norm
        self.norm = make_norm("model.norm", config.hidden_size, config.norm, context) if has_norm else None
        self.lm_head = LmHead(config, self.embedding, context) if is_last else None
        ropes = {layer.rope for layer in self.layers if layer.rope is not None}
        self._rotary = {rope: RotaryTable(rope, max_model_len, context) for rope in ropes}

    def embed(self, batch: ForwardBatch) -> Tensor:
        """First stage: [num_tokens, hidden_size]."""
        assert self.embedding is not None, "only the first stage embeds"
        return self.embedding(batch.input_ids, batch.positions)

    def run_layers(self, hidden_states: Tensor, batch: ForwardBatch, kv_caches: Sequence[KvCache]) -> Tensor:
        """This stage's layers: [num_tokens, hidden_size] in and out; kv_caches: one per local layer, written to."""
        cos_sin: dict[RopeConfig | None, tuple[Tensor, Tensor] | None] = {None: None}
        for rope, table in self._rotary.items():
            cos_sin[rope] = table(batch.positions)
        for layer, kv_cache in zip(self.layers, kv_caches, strict=True):
            hidden_states = layer(hidden_states, batch, kv_cache, cos_sin[layer.rope])
        return hidden_states

    def compute_logits(self, hidden_states: Tensor) -> Tensor:
        """Last stage: [num_rows, hidden_size] to [num_rows, vocab_size] float32."""
        assert self.lm_head is not None, "only the last stage has the head"
        return self.lm_head(hidden_states if self.norm is None else self.norm(hidden_states))

    def parameters(self) -> Iterator[Parameter]:
        if self.embedding is not None:
            yield from self.embedding.parameters()
        for layer in self.layers:
            yield from layer.parameters()
        if self.norm is not None:
            yield from self.norm.parameters()
        if self.lm_head is not None:
            yield from self.lm_head.parameters()
