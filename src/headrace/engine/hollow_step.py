"""The exchanges of a step without what is computed between them.

A rank that runs out of memory in the middle of a step leaves others waiting in an exchange, which over NCCL nobody can
leave. So it goes on exchanging, in the order and the sizes of the step, whatever: zeros, which nobody's output is made
of, as the step is undone. Where ranks sample together it says so instead of bringing candidates, so that none has a
token.
"""

from collections.abc import Callable, Iterable, Iterator
from functools import partial

import numpy as np
import torch
from torch import Tensor

from headrace.config import KvSharding
from headrace.costs.candidates import WORD_BYTES, largest_candidates_payload_bytes
from headrace.costs.exchanges import Exchange, Layout
from headrace.costs.sharding import shard_vocabulary, vocabulary_shard_sizes
from headrace.costs.sites import Phase, Site
from headrace.costs.steps import GREEDY_ROW_BYTES, Event, ForwardPass, SampledRows, WholeRows
from headrace.costs.volume import RankVolume
from headrace.engine.candidates import NO_TOKEN, OUT_OF_MEMORY
from headrace.engine.prompt_scores import PROMPT_LOGITS_ROWS
from headrace.engine.sharded_sampler import GATHERED_ROWS
from headrace.layers.context import LayerContext
from headrace.parallel.group import Group
from headrace.parallel.place import Place

Call = Callable[[], object]


class HollowStep:
    """What one rank calls in a step, in order, with zeros for everything.

    context: the groups and types of the layers; dtype: of activations.
    """

    def __init__(
        self, layout: Layout, place: Place, context: LayerContext, pp_group: Group, dtype: torch.dtype
    ) -> None:
        self._model, self._parallel = layout.model, layout.parallel
        self._stage, self._layers = place.stage, layout.stages()[place.stage]
        self._is_last = place.is_last_stage
        self._tp_group, self._kv_group, self._pp_group = context.tp_group, context.kv_group, pp_group
        self.device, self._dtype = context.kernels.device, dtype
        self._partial_dtype = context.partial_dtype or dtype

    def calls(self, events: Iterable[Event]) -> Iterator[Call]:
        """One by one, so that whoever has made some of them can go on with the next."""
        for event in events:
            match event:
                case ForwardPass(num_tokens=num_tokens):
                    yield from self._pass(num_tokens)
                case WholeRows(num_rows=num_rows) if self._samples_together:
                    yield self._gather_logits(num_rows)
                case SampledRows(num_rows=num_rows) if self._samples_together and self._parallel.gather_logits:
                    yield self._gather_logits(num_rows)
                case SampledRows() if self._samples_together:
                    yield partial(self._bring_words, event.candidate_bytes, OUT_OF_MEMORY)
                    if event.draw_bytes:
                        yield partial(self._bring_words, event.draw_bytes, NO_TOKEN)

    def num_sampling_calls(self, events: Iterable[Event]) -> int:
        """Of the last calls, those in which each rank says what all sample from together: a rank that has made one and
        cannot go on has been believed."""
        if not self._brings_candidates:
            return 0
        return sum(1 + bool(event.draw_bytes) for event in events if isinstance(event, SampledRows))

    @property
    def tells_all(self) -> bool:
        """Whether every rank brings candidates where a step samples, and so hears there of one that has no memory."""
        return self._brings_candidates and self._parallel.pipeline_parallel_size == 1

    @property
    def _brings_candidates(self) -> bool:
        return self._samples_together and not self._parallel.gather_logits

    @property
    def _samples_together(self) -> bool:
        return self._is_last and self._tp_group.world_size > 1

    def _pass(self, num_tokens: int) -> Iterator[Call]:
        shape = (num_tokens, self._model.hidden_size)
        if self._stage > 0:
            yield from self._receive(shape)
        if self._stage == 0 and self._parallel.shard_embedding and self._tp_group.world_size > 1:
            width = self._model.embedding.projection_size or self._model.hidden_size
            yield lambda: self._tp_group.all_reduce(self._zeros(num_tokens, width), Site.EMBEDDING)
        for layer in self._layers:
            if self._parallel.kv_sharding.splits_contexts and self._kv_group.world_size > 1:
                yield from self._context(num_tokens, Site.context(layer))
            if self._tp_group.world_size > 1:
                yield self._sum(shape, self._partial_dtype, Site.attention(layer))
                is_mixture = self._model.layers[layer].moe is not None
                yield self._sum(shape, self._dtype if is_mixture else self._partial_dtype, Site.mlp(layer))
        if not self._is_last:
            yield from self._send(shape)

    def _sum(self, shape: tuple[int, int], dtype: torch.dtype, site: str) -> Call:
        return lambda: self._tp_group.all_reduce(self._zeros(*shape, dtype=dtype), site, out_dtype=self._dtype)

    def _context(self, num_tokens: int, site: str) -> Iterator[Call]:
        group, attention = self._kv_group, self._model.attention
        num_heads = attention.num_heads // self._tp_group.world_size
        query = (num_tokens, num_heads, attention.head_dim)
        num_shared_heads = group.world_size * num_heads
        yield lambda: group.all_gather(self._zeros(*query), site)
        yield lambda: group.all_gather(self._zeros(num_tokens, num_shared_heads, 2, dtype=torch.float32), site)
        if self._parallel.kv_sharding is KvSharding.SEQUENCE:
            yield lambda: group.reduce_scatter(self._zeros(group.world_size, *query), site)

    def _receive(self, shape: tuple[int, int]) -> Iterator[Call]:
        site = Site.boundary(self._stage - 1)
        for _ in range(self._tensors_per_boundary):
            yield lambda: self._pp_group.recv_(self._boundary_part(shape), self._stage - 1, site)
            if self._is_sliced:
                yield lambda: self._tp_group.all_gather(self._boundary_part(shape), site)

    def _send(self, shape: tuple[int, int]) -> Iterator[Call]:
        site = Site.boundary(self._stage)
        for _ in range(self._tensors_per_boundary):
            yield lambda: self._pp_group.send(self._boundary_part(shape), self._stage + 1, site)

    @property
    def _tensors_per_boundary(self) -> int:
        return 2 if self._parallel.send_residual else 1

    @property
    def _is_sliced(self) -> bool:
        size = self._tp_group.world_size
        return self._parallel.slice_boundary and size > 1 and self._model.hidden_size % size == 0

    def _boundary_part(self, shape: tuple[int, int]) -> Tensor:
        num_elements = shape[0] * shape[1]
        return self._zeros(num_elements // self._tp_group.world_size if self._is_sliced else num_elements)

    def _gather_logits(self, num_rows: int) -> Call:
        sizes = vocabulary_shard_sizes(self._model.vocab_size, self._tp_group.world_size)
        dtype = self._dtype if self._parallel.gather_logits else torch.float32
        return lambda: self._tp_group.all_gather(
            self._zeros(num_rows, sizes[self._tp_group.rank], dtype=dtype), Site.LOGITS, sizes
        )

    def _bring_words(self, num_bytes: int, word: int) -> None:
        words = np.full(num_bytes // WORD_BYTES, word, np.int32)
        self._tp_group.all_gather(torch.from_numpy(words.view(np.float32)).to(self.device), Site.CANDIDATES)

    def _zeros(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.zeros(shape, dtype=dtype or self._dtype, device=self.device)


def largest_steps(layout: Layout, *, max_num_tokens: int, max_num_seqs: int) -> list[list[Event]]:
    """Steps with the smallest and the largest of each kind of exchange that any step makes."""
    largest_shard = len(shard_vocabulary(layout.model.vocab_size, 0, layout.parallel.tensor_parallel_size))
    candidate_bytes = largest_candidates_payload_bytes(max_num_seqs, largest_shard)
    decode, prefill = Phase.DECODE, Phase.PREFILL
    return [
        [ForwardPass(decode, 1), WholeRows(decode, 1), SampledRows(decode, 1, GREEDY_ROW_BYTES, WORD_BYTES)],
        [
            ForwardPass(prefill, max_num_tokens),
            WholeRows(prefill, max(GATHERED_ROWS, PROMPT_LOGITS_ROWS)),
            SampledRows(prefill, max_num_seqs, candidate_bytes, max_num_seqs * WORD_BYTES),
        ],
    ]


def largest_exchange_bytes(layout: Layout, rank: int, *, max_num_tokens: int, max_num_seqs: int) -> int:
    """What one exchange takes of a device's memory at most: of a hollow step, or of rows whose candidates do not
    suffice, with what is made of them before they are on the host; or candidates, all ranks' of which are copied twice
    before they are."""
    exchanges = RankVolume(layout, rank).exchanges(ForwardPass(Phase.PREFILL, max_num_tokens))
    in_a_pass = max((_num_bytes(exchange, layout) for exchange in exchanges), default=0)
    parts = shard_vocabulary(layout.model.vocab_size, 0, layout.parallel.tensor_parallel_size)
    num_rows, world_size = max(GATHERED_ROWS, PROMPT_LOGITS_ROWS), layout.parallel.tensor_parallel_size
    candidate_bytes = largest_candidates_payload_bytes(max_num_seqs, len(parts))
    # Own rows as they are and padded, everybody's, these end to end, and a copy of those that are read.
    row_bytes = (2 + 3 * world_size) * num_rows * len(parts) * torch.float32.itemsize
    return max(in_a_pass, row_bytes, (1 + 3 * world_size) * candidate_bytes)


def _num_bytes(exchange: Exchange, layout: Layout) -> int:
    """Of the tensor brought, and of what a group makes around it."""
    match exchange.operation:
        case "all_gather":
            return (1 + layout.callers[exchange.group]) * exchange.payload_bytes
        case "reduce_scatter":
            # As much is received, and one of its rows added up in float32 and rounded.
            return 2 * exchange.payload_bytes + 3 * exchange.payload_bytes // layout.callers[exchange.group]
        case _:
            return 2 * exchange.payload_bytes
