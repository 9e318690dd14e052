"""Token and position embeddings (replicated on every rank) and the output head (vocabulary sharded)."""

from collections.abc import Iterator

import torch
from torch import Tensor

from headrace.config import ModelConfig
from headrace.costs.sharding import shard_range
from headrace.costs.sites import Site
from headrace.layers.context import LayerContext
from headrace.layers.linear import ColumnParallelLinear, even_part
from headrace.layers.parameter import Parameter, whole_matrix


class TokenEmbedding:
    """scale * E[ids], plus what OPT adds: a projection to hidden_size and a learned position per token.

    Replicated rather than sharded: looking up a few rows costs no communication, summing shards would.
    """

    def __init__(self, config: ModelConfig, context: LayerContext, dtype: torch.dtype) -> None:
        embedding = config.embedding
        width = embedding.projection_size or config.hidden_size
        self._kernels = context.kernels
        self._dtype = dtype
        # Rounded to the activations' dtype, as the models were trained.
        self._scale = float(torch.tensor(embedding.scale, dtype=dtype))
        self._position_offset = embedding.position_offset
        # A tied table is also the output head, the largest matrix read per token.
        self.table = Parameter(
            [whole_matrix("model.embed_tokens.weight", config.vocab_size, width)],
            is_quantizable=config.tie_word_embeddings,
        )
        self.positions = (
            Parameter([whole_matrix("model.embed_positions.weight", embedding.num_positions, config.hidden_size)])
            if embedding.num_positions
            else None
        )
        self.project_in = (
            Parameter([whole_matrix("model.project_in.weight", config.hidden_size, width)])
            if embedding.projection_size
            else None
        )

    def __call__(self, input_ids: Tensor, positions: Tensor) -> Tensor:
        """Shapes: input_ids and positions [num_tokens] int64; returns [num_tokens, hidden_size]."""
        hidden_states = self._kernels.embedding(input_ids, self.table.weight, dtype=self._dtype, scale=self._scale)
        if self.project_in is not None:
            hidden_states = self._kernels.linear(hidden_states, self.project_in.weight)
        if self.positions is not None:
            weight, offset = self.positions.weight, self._position_offset
            rows = self._kernels.embedding(positions, weight, dtype=self._dtype, offset=offset)
            self._kernels.add_(hidden_states, rows)
        return hidden_states

    def parameters(self) -> Iterator[Parameter]:
        yield from (p for p in (self.table, self.positions, self.project_in) if p is not None)


class LmHead:
    """Logits over the vocabulary, each rank computing its share of the rows.

    A tied head reads the embedding table itself, so the matrix exists once.
    """

    def __init__(self, config: ModelConfig, embedding: TokenEmbedding | None, context: LayerContext) -> None:
        self._linear = context.kernels.linear
        self._group = context.tp_group
        self._soft_cap = config.final_logit_soft_cap
        num_ranks = self._group.world_size
        self._sizes = [len(shard_range(config.vocab_size, rank, num_ranks)) for rank in range(num_ranks)]
        width = config.embedding.projection_size or config.hidden_size
        self._tied = embedding.table if config.tie_word_embeddings and embedding is not None else None
        # A last pipeline stage has no embedding: it loads the tied matrix for its head alone.
        name = "model.embed_tokens" if config.tie_word_embeddings else "lm_head"
        self._own = (
            ColumnParallelLinear([even_part(name, config.vocab_size, context)], width, context)
            if self._tied is None
            else None
        )
        self.project_out = (
            Parameter([whole_matrix("model.project_out.weight", width, config.hidden_size)])
            if config.embedding.projection_size
            else None
        )

    def __call__(self, hidden_states: Tensor) -> Tensor:
        """Shapes: hidden_states [num_rows, hidden_size]; returns [num_rows, vocab_size] float32."""
        if self.project_out is not None:
            hidden_states = self._linear(hidden_states, self.project_out.weight)
        logits = self._logits(hidden_states)
        if self._soft_cap is not None:
            logits = self._soft_cap * torch.tanh(logits / self._soft_cap)
        return logits

    def matrices(self) -> Iterator[Parameter]:
        """What hidden states are multiplied with, the embedding's table if it is tied."""
        if self._tied is not None:
            yield self._tied
        yield from (parameter for parameter in self.parameters() if parameter.is_matrix)

    def _logits(self, hidden_states: Tensor) -> Tensor:
        if self._own is not None:
            parts = self._group.all_gather(self._own(hidden_states, out_dtype=torch.float32), Site.LOGITS, self._sizes)
            return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)
        assert self._tied is not None
        return self._linear(hidden_states, self._tied.weight, out_dtype=torch.float32)

    def parameters(self) -> Iterator[Parameter]:
        if self._own is not None:
            yield from self._own.parameters()
        if self.project_out is not None:
            yield self.project_out
