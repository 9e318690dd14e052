"""The decoder that every family is an instance of."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from headrace.batch import ForwardBatch
from headrace.config import LayerConfig, ModelConfig, NormPlacement, RopeConfig
from headrace.costs.sites import Site
from headrace.kernels import Kernels, KvCache
from headrace.layers.attention import Attention
from headrace.layers.context import LayerContext
from headrace.layers.embedding import LmHead, TokenEmbedding
from headrace.layers.mlp import MoeMlp, make_mlp
from headrace.layers.norm import Norm, make_norm
from headrace.layers.parameter import Parameter
from headrace.layers.rotary import RotaryTable

Sublayer = Callable[[Tensor], Tensor]


@dataclass(kw_only=True)
class ResidualStream:
    """What sublayers add to. The last one's output waits in `update`, to be added by the op that reads the sum next.

    Shapes: both [num_tokens, hidden_size]; hidden_states is changed in place.
    """

    hidden_states: Tensor
    update: Tensor | None = None

    def normed(self, norm: Norm) -> Tensor:
        """norm(hidden_states + update), which leaves nothing waiting."""
        update, self.update = self.update, None
        return norm(self.hidden_states) if update is None else norm(update, residual=self.hidden_states)

    def total(self, kernels: Kernels) -> Tensor:
        """hidden_states + update, which leaves nothing waiting."""
        if self.update is not None:
            kernels.add_(self.hidden_states, self.update)
            self.update = None
        return self.hidden_states


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

    def __call__(self, stream: ResidualStream, sublayer: Sublayer) -> None:
        if self.placement is NormPlacement.POST:
            assert stream.update is None, "each sublayer leaves a normalized sum"
            stream.update = sublayer(stream.hidden_states)
            stream.hidden_states = stream.normed(self.norm)
            return
        update = sublayer(stream.normed(self.norm))
        stream.update = update if self.post_norm is None else self.post_norm(update)

    def parameters(self) -> Iterator[Parameter]:
        yield from self.norm.parameters()
        if self.post_norm is not None:
            yield from self.post_norm.parameters()


class DecoderLayer:
    """Attention and feed-forward, each added to the residual stream."""

    def __init__(self, index: int, config: ModelConfig, context: LayerContext) -> None:
        prefix = f"model.layers.{index}"
        layer: LayerConfig = config.layers[index]
        self.rope = layer.rope
        self.attention = Attention(
            f"{prefix}.self_attn",
            config,
            layer,
            context.layer_softmax(index),
            context,
            site=Site.attention(index),
            context_site=Site.context(index),
        )
        self.mlp = make_mlp(f"{prefix}.mlp", config, layer.moe, context, site=Site.mlp(index))
        self.attention_residual = Residual(
            f"{prefix}.input_layernorm", f"{prefix}.post_self_attn_layernorm", config, context
        )
        self.mlp_residual = Residual(
            f"{prefix}.post_attention_layernorm", f"{prefix}.post_mlp_layernorm", config, context
        )

    def __call__(
        self, stream: ResidualStream, batch: ForwardBatch, kv_cache: KvCache, cos_sin: tuple[Tensor, Tensor] | None
    ) -> None:
        self.attention_residual(stream, lambda x: self.attention(x, batch, kv_cache, cos_sin))
        self.mlp_residual(stream, self.mlp)

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

    def embed(self, batch: ForwardBatch) -> ResidualStream:
        """First stage: what the layers start from."""
        assert self.embedding is not None, "only the first stage embeds"
        return ResidualStream(hidden_states=self.embedding(batch.input_ids, batch.positions))

    def forward(self, batch: ForwardBatch, kv_caches: Sequence[KvCache]) -> Tensor:
        """All layers of a model that is one stage: hidden states [num_tokens, hidden_size]."""
        stream = self.embed(batch)
        self.run_layers(stream, batch, kv_caches)
        return stream.total(self.kernels)

    def run_layers(self, stream: ResidualStream, batch: ForwardBatch, kv_caches: Sequence[KvCache]) -> None:
        """This stage's layers, which change the stream; kv_caches: one per local layer, written to."""
        cos_sin: dict[RopeConfig | None, tuple[Tensor, Tensor] | None] = {None: None}
        for rope, table in self._rotary.items():
            cos_sin[rope] = table(batch.positions)
        for layer, kv_cache in zip(self.layers, kv_caches, strict=True):
            layer(stream, batch, kv_cache, cos_sin[layer.rope])

    def compute_logits(self, hidden_states: Tensor) -> Tensor:
        """Last stage: [num_rows, hidden_size] to [num_rows, vocab_size] float32."""
        assert self.lm_head is not None, "only the last stage has the head"
        return self.lm_head(self._normed(hidden_states))

    def last_hidden_states(self, hidden_states: Tensor) -> Tensor:
        """Last stage: what the vocabulary's matrix is multiplied with; `last_hidden_state` of transformers.

        Shapes: [num_rows, hidden_size]; returns as many rows, of projection_size where the model has that.
        """
        assert self.lm_head is not None, "only the last stage has the head"
        return self.lm_head.project(self._normed(hidden_states))

    def _normed(self, hidden_states: Tensor) -> Tensor:
        return hidden_states if self.norm is None else self.norm(hidden_states)

    def linear_parameters(self, *, with_experts: bool = True) -> Iterator[Parameter]:
        """The matrices that tokens are multiplied with."""
        left_out = (
            set[int]() if with_experts else {id(p) for mixture in self.mixtures() for p in mixture.expert_parameters()}
        )
        found = (parameter for layer in self.layers for parameter in layer.parameters() if parameter.is_matrix)
        yield from (parameter for parameter in found if id(parameter) not in left_out)
        if self.lm_head is not None:
            yield from self.lm_head.matrices()

    def mixtures(self) -> Iterator[MoeMlp]:
        yield from (layer.mlp for layer in self.layers if isinstance(layer.mlp, MoeMlp))

    def parameters(self) -> Iterator[Parameter]:
        if self.embedding is not None:
            yield from self.embedding.parameters()
        for layer in self.layers:
            yield from layer.parameters()
        if self.norm is not None:
            yield from self.norm.parameters()
        if self.lm_head is not None:
            yield from self.lm_head.parameters()
