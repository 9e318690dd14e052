"""Token and position embeddings, and the output head, whose vocabulary is sharded among ranks."""

from collections.abc import Iterator

import torch
from torch import Tensor

from headrace.config import ModelConfig
from headrace.costs.sharding import shard_vocabulary, vocabulary_shard_sizes
from headrace.costs.sites import Site
from headrace.layers.context import LayerContext
from headrace.layers.parameter import Parameter, ParameterRows, TensorSlice, whole_matrix
from headrace.parallel.group import Group


class TokenEmbedding:
    """scale * E[ids], plus what OPT adds: a projection to hidden_size and a learned position per token.

    E is replicated rather than sharded: looking up a few rows costs no communication, summing shards would. With
    `ParallelConfig.shard_embedding` a rank holds its share of the vocabulary all the same, looks up zeros for the
    tokens of others, and the ranks' rows are summed. Positions and the projection are replicated in either case.
    """

    def __init__(self, config: ModelConfig, context: LayerContext, dtype: torch.dtype) -> None:
        embedding = config.embedding
        width = embedding.projection_size or config.hidden_size
        group = context.tp_group
        self._kernels = context.kernels
        self._dtype = dtype
        # Rounded to the activations' dtype, as the models were trained.
        self._scale = float(torch.tensor(embedding.scale, dtype=dtype))
        self._position_offset = embedding.position_offset
        self._summing_group = group if context.parallel.shard_embedding and group.world_size > 1 else None
        self.rows = (
            range(config.vocab_size)
            if self._summing_group is None
            else shard_vocabulary(config.vocab_size, group.rank, group.world_size)
        )
        """Tokens whose embedding this rank holds."""
        # A tied table is also the output head, the largest matrix read per token.
        self.table = Parameter(
            [_matrix_rows("model.embed_tokens.weight", self.rows, config.vocab_size, width)],
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
        hidden_states = self._look_up(input_ids)
        if self.project_in is not None:
            hidden_states = self._kernels.linear(hidden_states, self.project_in.weight)
        if self.positions is not None:
            weight, offset = self.positions.weight, self._position_offset
            rows = self._kernels.embedding(positions, weight, dtype=self._dtype, offset=offset)
            self._kernels.add_(hidden_states, rows)
        return hidden_states

    def _look_up(self, input_ids: Tensor) -> Tensor:
        """[num_tokens, projection_size or hidden_size]"""
        weight = self.table.weight
        if self._summing_group is None:
            return self._kernels.embedding(input_ids, weight, dtype=self._dtype, scale=self._scale)
        own = self._kernels.embedding(
            input_ids, weight, dtype=self._dtype, scale=self._scale, offset=-self.rows.start, zeros_outside=True
        )
        return self._summing_group.all_reduce(own, Site.EMBEDDING)

    def parameters(self) -> Iterator[Parameter]:
        yield from (p for p in (self.table, self.positions, self.project_in) if p is not None)


class LmHead:
    """Logits over this rank's share of the vocabulary: `shard_vocabulary`.

    A tied head reads its rows of the embedding table itself, so the matrix exists once. With
    `ParallelConfig.gather_logits` each rank gets the logits of the whole vocabulary, rounded to the type of activations
    before they travel.
    """

    def __init__(self, config: ModelConfig, embedding: TokenEmbedding | None, context: LayerContext) -> None:
        self._linear = context.kernels.linear
        self._soft_cap = config.final_logit_soft_cap
        group, vocab_size = context.tp_group, config.vocab_size
        self._gathering_group = group if context.parallel.gather_logits and group.world_size > 1 else None
        self._sizes = vocabulary_shard_sizes(vocab_size, group.world_size)
        rows = shard_vocabulary(vocab_size, group.rank, group.world_size)
        width = config.embedding.projection_size or config.hidden_size
        table = embedding.table if config.tie_word_embeddings and embedding is not None else None
        if table is None:
            # A last pipeline stage has no embedding: it loads its share of the tied matrix for its head alone.
            name = "model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"
            self.matrix = Parameter([_matrix_rows(name, rows, vocab_size, width)], is_quantizable=True)
        elif table.slices[0].rows == rows:
            self.matrix = table
        else:
            self.matrix = ParameterRows(table, rows, context.kernels.weight_rows)
        self._owns_matrix = table is None
        self.project_out = (
            Parameter([whole_matrix("model.project_out.weight", width, config.hidden_size)])
            if config.embedding.projection_size
            else None
        )

    def __call__(self, hidden_states: Tensor) -> Tensor:
        """Shapes: hidden_states [num_rows, hidden_size]; returns [num_rows, rank's tokens] float32, or
        [num_rows, vocab_size] where logits are gathered."""
        hidden_states = self.project(hidden_states)
        if self._gathering_group is None:
            logits = self._linear(hidden_states, self.matrix.weight, out_dtype=torch.float32)
        else:
            logits = self._gathered(hidden_states, self._gathering_group)
        if self._soft_cap is not None:
            logits = self._soft_cap * torch.tanh(logits / self._soft_cap)
        return logits

    def project(self, hidden_states: Tensor) -> Tensor:
        """To the width of the vocabulary's matrix; the same tensor where that is the model's."""
        if self.project_out is None:
            return hidden_states
        return self._linear(hidden_states, self.project_out.weight)

    def matrices(self) -> Iterator[Parameter]:
        """What hidden states are multiplied with, the embedding's rows if it is tied; not a share without tokens."""
        if self.matrix.local_rows:
            yield self.matrix
        if self.project_out is not None:
            yield self.project_out

    def parameters(self) -> Iterator[Parameter]:
        """Those the embedding does not have."""
        if self._owns_matrix:
            yield self.matrix
        if self.project_out is not None:
            yield self.project_out

    def _gathered(self, hidden_states: Tensor, group: Group) -> Tensor:
        shard = self._linear(hidden_states, self.matrix.weight)
        return torch.cat(group.all_gather(shard, Site.LOGITS, self._sizes), dim=-1).float()


def _matrix_rows(name: str, rows: range, num_rows: int, num_columns: int) -> TensorSlice:
    return TensorSlice(name=name, shape=(num_rows, num_columns), rows=rows, columns=range(num_columns))
