"""The calls that one rank makes in one step, each with its bytes."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from headrace.config import AllReduceDtype, KvSharding, ModelConfig, ParallelConfig, Transport
from headrace.costs.algorithms import (
    DIRECT,
    POINT_TO_POINT,
    RING,
    Summands,
    all_gather_wire_bytes,
    all_reduce_algorithm,
    all_reduce_wire_bytes,
    summand_bytes,
)
from headrace.costs.sharding import check_heads_divide, shard_vocabulary, stage_layers
from headrace.costs.sites import Site
from headrace.costs.steps import Event, ForwardPass, SampledRows, WholeRows

_LOGIT_BYTES = 4
_NORMALIZER_BYTES = 8
"""Of a head: the denominator of its softmax and the logit that it refers to, in float32."""


def ring(summands: Summands, world_size: int) -> str:  # noqa: ARG001
    """What the published formulas assume of every all-reduce."""
    return RING


def direct(summands: Summands, world_size: int) -> str:  # noqa: ARG001
    return DIRECT


@dataclass(frozen=True, kw_only=True)
class WireRules:
    """What an engine does where `ParallelConfig` leaves it a choice.

    all_reduce: the algorithm for so many ranks.
    gathers_logits_to_root: whole logits go to the first rank of the last stage alone, instead of to each of its ranks.
    gathers_scattered_sums: a reduce-scatter hands all its rows to every rank, which adds up its own.
    all_gather: the algorithm.
    gathers_longest_parts: where parts differ in size, each rank sends as much as the one that has most.
    sums_travel_as_summands: a sum is not rounded to the activations' type before it travels.
    """

    all_reduce: Callable[[Summands, int], str] = all_reduce_algorithm
    gathers_logits_to_root: bool = False
    gathers_scattered_sums: bool = False
    all_gather: str = DIRECT
    gathers_longest_parts: bool = False
    sums_travel_as_summands: bool = False


def rules_of(transport: Transport) -> WireRules:
    """Of Headrace over this transport: gloo's sums are gathered and added up, NCCL's are taken to go around a ring."""
    match transport:
        case Transport.GLOO:
            return WireRules(all_reduce=direct, gathers_scattered_sums=True)
        case Transport.NCCL:
            return WireRules(all_reduce=ring, all_gather=RING, gathers_longest_parts=True, sums_travel_as_summands=True)
        case Transport.AUTO | Transport.SHM | Transport.MPI:
            return WireRules()


LITERAL_RULES = WireRules(all_reduce=ring, gathers_logits_to_root=True)
"""Of an engine that does what the published formulas count: with every literal flag of `ParallelConfig`, vLLM 0.8.5's
V0 engine, which the formulas describe."""

LITERAL_TO_ALL_RULES = WireRules(all_reduce=ring)
"""The same with logits for each rank, as in vLLM 0.8.5's V1 engine, which sends boundaries whole."""


class Exchange(NamedTuple):
    """A call that is made alike at each of `sites`, `calls_per_site` times; bytes are those of one call."""

    operation: str
    group: str
    sites: tuple[str, ...]
    algorithm: str
    payload_bytes: int
    wire_bytes: int
    calls_per_site: int = 1


@dataclass(frozen=True, kw_only=True)
class Layout:
    """A model spread over ranks; activation_bytes: of an element of the activations.

    Raises:
        ParallelismError: the layout does not fit the model; names what would.
    """

    model: ModelConfig
    parallel: ParallelConfig
    activation_bytes: int
    rules: WireRules = WireRules()

    def __post_init__(self) -> None:
        attention = self.model.attention
        check_heads_divide(attention.num_heads, attention.num_kv_heads, self.parallel.tensor_parallel_size)
        self.stages()

    @property
    def num_context_sharers(self) -> int:
        """Ranks of a stage that have the same KV head."""
        return max(1, self.parallel.tensor_parallel_size // self.model.attention.num_kv_heads)

    @property
    def callers(self) -> dict[str, int]:
        """By name of a group, how many ranks make one of its calls together: what is sent has one sender."""
        return {"tp": self.parallel.tensor_parallel_size, "kv": self.num_context_sharers, "pp": 1}

    def stages(self) -> list[range]:
        """Layers of each stage."""
        parallel = self.parallel
        return stage_layers(self.model.num_hidden_layers, parallel.pipeline_parallel_size, parallel.pipeline_layers)


class RankCalls:
    """What one rank of a layout calls. Without a peer there is nothing to call.

    Attention and feed-forward of every layer end in one all-reduce each, whatever the family: normalizations, biases,
    routers and projections of the embedding are computed by each rank alike.
    """

    def __init__(self, layout: Layout, rank: int) -> None:
        parallel, model = layout.parallel, layout.model
        self._layout = layout
        self._stage, self._tp_rank = divmod(rank, parallel.tensor_parallel_size)
        self._num_ranks = parallel.tensor_parallel_size
        self._is_last = self._stage == parallel.pipeline_parallel_size - 1
        self._is_sliced = parallel.slice_boundary and self._num_ranks > 1 and model.hidden_size % self._num_ranks == 0
        layers = layout.stages()[self._stage]
        self._context_sites = tuple(map(Site.context, layers))
        mixtures = [layer for layer in layers if model.layers[layer].moe is not None]
        self._mixture_sites = tuple(map(Site.mlp, mixtures))
        self._linear_sites = tuple(
            site
            for layer in layers
            for site in (Site.attention(layer), *(() if layer in mixtures else (Site.mlp(layer),)))
        )

    def of(self, event: Event) -> Iterator[Exchange]:
        """In the order of the forward pass."""
        match event:
            case ForwardPass(num_tokens=num_tokens):
                yield from self._pass(num_tokens)
            case SampledRows() if self._is_last and self._num_ranks > 1:
                yield from self._sampling(event)
            case WholeRows(num_rows=num_rows) if self._is_last and self._num_ranks > 1:
                yield self._logits(num_rows)

    def _pass(self, num_tokens: int) -> Iterator[Exchange]:
        if self._stage > 0:
            yield from self._receive(num_tokens)
        if self._num_ranks > 1:
            yield from self._contexts(num_tokens)
            yield from self._sums(num_tokens)
        if not self._is_last:
            yield self._send(num_tokens)

    def _contexts(self, num_tokens: int) -> Iterator[Exchange]:
        """Of ranks that hold shares of one KV head's contexts: queries, then denominators and references of all their
        heads, then, unless the output projection sums them, numerators."""
        layout = self._layout
        attention, sharding = layout.model.attention, layout.parallel.kv_sharding
        num_sharers = layout.num_context_sharers
        if sharding is KvSharding.REPLICATED or num_sharers == 1:
            return
        num_rows = num_tokens * attention.num_heads // self._num_ranks
        query_bytes = num_rows * attention.head_dim * layout.activation_bytes
        for num_bytes in (query_bytes, num_sharers * num_rows * _NORMALIZER_BYTES):
            sent = all_gather_wire_bytes(num_bytes, num_sharers)
            yield Exchange("all_gather", "kv", self._context_sites, layout.rules.all_gather, num_bytes, sent)
        if sharding is KvSharding.SEQUENCE:
            payload_bytes = num_sharers * query_bytes
            sent = (num_sharers - 1) * (payload_bytes if layout.rules.gathers_scattered_sums else query_bytes)
            yield Exchange("reduce_scatter", "kv", self._context_sites, DIRECT, payload_bytes, sent)

    def _sums(self, num_tokens: int) -> Iterator[Exchange]:
        parallel, model, activation_bytes = self._layout.parallel, self._layout.model, self._layout.activation_bytes
        if self._stage == 0 and parallel.shard_embedding:
            # Of rows of the table, before whatever projects them.
            width = model.embedding.projection_size or model.hidden_size
            yield self._all_reduce((Site.EMBEDDING,), num_tokens, width, activation_bytes)
        element_bytes = summand_bytes(parallel.all_reduce_dtype, activation_bytes)
        if self._linear_sites:
            yield self._all_reduce(self._linear_sites, num_tokens, model.hidden_size, element_bytes)
        if self._mixture_sites:
            # Experts are summed before ranks are, and rounded to the activations' type.
            yield self._all_reduce(self._mixture_sites, num_tokens, model.hidden_size, activation_bytes)

    def _all_reduce(self, sites: tuple[str, ...], num_rows: int, row_size: int, element_bytes: int) -> Exchange:
        layout = self._layout
        summands = Summands(
            num_rows=num_rows,
            row_size=row_size,
            summand_bytes=element_bytes,
            sum_bytes=element_bytes if layout.rules.sums_travel_as_summands else layout.activation_bytes,
            may_quantize=layout.parallel.all_reduce_dtype is AllReduceDtype.INT8,
        )
        algorithm = layout.rules.all_reduce(summands, self._num_ranks)
        sent = all_reduce_wire_bytes(summands, algorithm, self._tp_rank, self._num_ranks)
        return Exchange("all_reduce", "tp", sites, algorithm, summands.payload_bytes, sent)

    def _send(self, num_tokens: int) -> Exchange:
        num_bytes = self._boundary_bytes(num_tokens)
        site = (Site.boundary(self._stage),)
        return Exchange("send", "pp", site, POINT_TO_POINT, num_bytes, num_bytes, self._tensors_per_boundary)

    def _receive(self, num_tokens: int) -> Iterator[Exchange]:
        num_bytes, num_tensors = self._boundary_bytes(num_tokens), self._tensors_per_boundary
        site = (Site.boundary(self._stage - 1),)
        yield Exchange("recv", "pp", site, POINT_TO_POINT, num_bytes, 0, num_tensors)
        if self._is_sliced:
            sent = all_gather_wire_bytes(num_bytes, self._num_ranks)
            algorithm = self._layout.rules.all_gather
            yield Exchange("all_gather", "tp", site, algorithm, num_bytes, sent, num_tensors)

    @property
    def _tensors_per_boundary(self) -> int:
        return 2 if self._layout.parallel.send_residual else 1

    def _boundary_bytes(self, num_tokens: int) -> int:
        """Of one tensor [num_tokens, hidden_size], or of this rank's share of it."""
        num_bytes = num_tokens * self._layout.model.hidden_size * self._layout.activation_bytes
        return num_bytes // self._num_ranks if self._is_sliced else num_bytes

    def _sampling(self, rows: SampledRows) -> Iterator[Exchange]:
        if self._layout.parallel.gather_logits:
            yield self._logits(rows.num_rows)
            return
        yield self._gather(Site.CANDIDATES, rows.candidate_bytes)
        if rows.draw_bytes:
            yield self._gather(Site.CANDIDATES, rows.draw_bytes)

    def _logits(self, num_rows: int) -> Exchange:
        """float32, as they are computed; in the activations' type where literal behaviour is asked for."""
        layout = self._layout
        element_bytes = layout.activation_bytes if layout.parallel.gather_logits else _LOGIT_BYTES
        shard = shard_vocabulary(layout.model.vocab_size, self._tp_rank, self._num_ranks)
        num_bytes = num_rows * len(shard) * element_bytes
        if layout.rules.gathers_logits_to_root:
            sent = 0 if self._tp_rank == 0 else num_bytes
            return Exchange("gather", "tp", (Site.LOGITS,), DIRECT, num_bytes, sent)
        longest = shard_vocabulary(layout.model.vocab_size, 0, self._num_ranks)
        return self._gather(Site.LOGITS, num_bytes, num_rows * len(longest) * element_bytes)

    def _gather(self, site: str, num_bytes: int, longest_bytes: int | None = None) -> Exchange:
        """longest_bytes: of the part of the rank that has most, if parts differ."""
        rules = self._layout.rules
        part_bytes = longest_bytes if longest_bytes is not None and rules.gathers_longest_parts else num_bytes
        sent = all_gather_wire_bytes(part_bytes, self._num_ranks)
        return Exchange("all_gather", "tp", (site,), rules.all_gather, num_bytes, sent)
