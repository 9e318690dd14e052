"""Predicted bytes: the published formulas against figures worked out by hand, and the closed form of what an engine
sends against a simulation that makes every call, rank by rank and message by message."""

from collections import Counter, defaultdict
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.cache.block_manager import BlockManager
from headrace.config import AllReduceDtype, KvSharding, ParallelConfig, SamplingParams, SchedulerConfig, Transport
from headrace.costs.algorithms import Summands, all_reduce_algorithm, all_reduce_wire_bytes
from headrace.costs.exchanges import LITERAL_RULES, LITERAL_TO_ALL_RULES, Layout, WireRules, rules_of
from headrace.costs.published import published_pipeline_parallel, published_tensor_parallel
from headrace.costs.sites import Phase
from headrace.costs.steps import ForwardPass, RequestShape, SampledRows, WholeRows, request_run
from headrace.costs.volume import (
    ExchangeKind,
    RankVolume,
    Sums,
    VolumeRow,
    add_totals,
    differences,
    predict_request,
    predict_run,
)
from headrace.engine.scheduler import Scheduler
from headrace.engine.sequence import FinishReason, Sequence
from headrace.errors import ConfigError, ParallelismError
from headrace.models.families import read_model_config

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_act": "silu",
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-05,
    "torch_dtype": "bfloat16",
}
LLAMA_8B = LLAMA | {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
}
LLAMA_3B = LLAMA | {
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "num_hidden_layers": 28,
    "num_attention_heads": 24,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "tie_word_embeddings": True,
}
LLAMA_13B = LLAMA | {
    "hidden_size": 5120,
    "intermediate_size": 13824,
    "num_hidden_layers": 40,
    "num_attention_heads": 40,
    "num_key_value_heads": 40,
    "vocab_size": 32000,
}
MODELS = {"8B": LLAMA_8B, "3B": LLAMA_3B, "13B": LLAMA_13B}
REQUEST = RequestShape(prompt_tokens=128, output_tokens=128)
BF16_BYTES = 2

LITERAL = ParallelConfig(shard_embedding=True, send_residual=True, slice_boundary=True, gather_logits=True)


def model(hf_config):
    return read_model_config(hf_config)[1]


def literal(name, *, t=1, p=1, rules=LITERAL_RULES, **flags):
    parallel = replace(LITERAL, tensor_parallel_size=t, pipeline_parallel_size=p, **flags)
    return Layout(model=model(MODELS[name]), parallel=parallel, activation_bytes=BF16_BYTES, rules=rules)


def pick(rows, **wanted):
    return [row for row in rows if all(getattr(row, name) == value for name, value in wanted.items())]


def counts(rows, **wanted):
    return sum(row.count for row in pick(rows, **wanted))


def payload(rows, **wanted):
    return sum(row.payload_bytes for row in pick(rows, **wanted))


def wire(rows, **wanted):
    return sum(row.wire_bytes for row in pick(rows, **wanted))


TENSOR_PARALLEL = [
    ("8B", 2, 65, 8255, 64128, 152_199_168, 135_782_400, 16_416_768),
    ("8B", 4, 65, 8255, 32064, 211_881_984, 203_673_600, 8_208_384),
    ("3B", 2, 57, 7239, 64128, 105_719_808, 89_303_040, 16_416_768),
    ("3B", 4, 57, 7239, 32064, 142_162_944, 133_954_560, 8_208_384),
    ("13B", 2, 81, 10287, 16000, 215_603_200, 211_507_200, 4_096_000),
    ("13B", 4, 81, 10287, 8000, 319_308_800, 317_260_800, 2_048_000),
]
PIPELINE_PARALLEL = [
    ("8B", 2, 4_177_920),
    ("8B", 4, 12_533_760),
    ("3B", 2, 3_133_440),
    ("3B", 4, 9_400_320),
    ("13B", 2, 5_222_400),
    ("13B", 4, 15_667_200),
]


class TestPublished:
    @pytest.mark.parametrize(
        ("name", "t", "num_prefill", "num_decode", "shard", "total", "all_reduce", "gather"), TENSOR_PARALLEL
    )
    def test_tensor_parallel(self, name, t, num_prefill, num_decode, shard, total, all_reduce, gather):
        volume = published_tensor_parallel(model(MODELS[name]), t, REQUEST, BF16_BYTES)
        assert (volume.all_reduce_bytes, volume.gather_bytes, volume.total_bytes) == (all_reduce, gather, total)
        assert (volume.num_all_reduces, volume.num_tokens) == (num_prefill, 255)

    @pytest.mark.parametrize(("name", "p", "total"), PIPELINE_PARALLEL)
    def test_pipeline_parallel(self, name, p, total):
        volume = published_pipeline_parallel(model(MODELS[name]), p, REQUEST, BF16_BYTES)
        assert volume.total_bytes == total
        assert (volume.num_boundaries, volume.tensors_per_boundary) == (p - 1, 2)

    def test_a_size_that_does_not_divide_stays_exact(self):
        volume = published_tensor_parallel(model(LLAMA_8B), 3, REQUEST, BF16_BYTES)
        assert volume.ring_factor == Fraction(4, 3)
        assert volume.gather_bytes == 128 * 128256 // 3 * 2
        assert volume.all_reduce_bytes == Fraction(65 * 255 * 4096 * 2 * 4, 3)

    def test_a_batch_multiplies_tokens(self):
        batch = RequestShape(prompt_tokens=128, output_tokens=128, batch_size=3)
        for shape, times in ((REQUEST, 3), (batch, 1)):
            volume = published_tensor_parallel(model(LLAMA_8B), 4, shape, BF16_BYTES)
            assert volume.total_bytes * times == 3 * 211_881_984
            assert (
                published_pipeline_parallel(model(LLAMA_8B), 2, shape, BF16_BYTES).total_bytes * times == 3 * 4_177_920
            )

    def test_one_rank_is_as_printed_not_as_sent(self):
        volume = published_tensor_parallel(model(LLAMA_8B), 1, REQUEST, BF16_BYTES)
        assert (volume.all_reduce_bytes, volume.gather_bytes) == (0, 128 * 128256 * 2)


class TestLiteralEngine:
    """Call counts and bytes of an engine that follows the formulas, for the models of arXiv:2507.14392."""

    @pytest.mark.parametrize(
        ("name", "t", "num_prefill", "num_decode", "shard", "total", "all_reduce", "gather"), TENSOR_PARALLEL
    )
    def test_tensor_parallel_calls(self, name, t, num_prefill, num_decode, shard, total, all_reduce, gather):
        ranks = predict_request(literal(name, t=t), REQUEST, 2048)
        for rank, rows in enumerate(ranks):
            assert counts(rows, operation="all_reduce", phase=Phase.PREFILL) == num_prefill
            assert counts(rows, operation="all_reduce", phase=Phase.DECODE) == num_decode
            assert wire(rows, operation="all_reduce") == all_reduce
            assert counts(rows, operation="gather") == 128
            assert payload(rows, operation="gather") == 128 * shard * BF16_BYTES == gather
            assert wire(rows, operation="gather") == (gather if rank else 0)
            assert {row.operation for row in rows} == {"all_reduce", "gather"}
        hidden_size = MODELS[name]["hidden_size"]
        for row in pick(ranks[0], operation="all_reduce"):
            num_tokens = 128 if row.phase is Phase.PREFILL else 1
            assert row.payload_bytes == row.count * num_tokens * hidden_size * BF16_BYTES
        assert sum(wire(rows) for rows in ranks) == t * all_reduce + (t - 1) * gather

    @pytest.mark.parametrize(("name", "p", "total"), PIPELINE_PARALLEL)
    def test_pipeline_parallel_calls(self, name, p, total):
        ranks = predict_request(literal(name, p=p), REQUEST, 2048)
        hidden_size = MODELS[name]["hidden_size"]
        for stage, rows in enumerate(ranks[:-1]):
            sends = pick(rows, operation="send")
            assert {row.site for row in sends} == {f"boundary.{stage}"}
            prefill, decode = (pick(sends, phase=phase) for phase in (Phase.PREFILL, Phase.DECODE))
            assert (counts(prefill), payload(prefill)) == (2, 2 * 128 * hidden_size * BF16_BYTES)
            assert (counts(decode), payload(decode)) == (254, 254 * hidden_size * BF16_BYTES)
        assert not pick(ranks[-1], operation="send")
        assert sum(wire(rows) for rows in ranks) == total
        assert sum(payload(rows, operation="recv") for rows in ranks) == total

    @pytest.mark.parametrize(("name", "first", "second"), [("8B", 33, 32), ("3B", 29, 28), ("13B", 41, 40)])
    def test_hybrid_calls_in_each_pass(self, name, first, second):
        step = Counter([ForwardPass(Phase.DECODE, 1), SampledRows(Phase.DECODE, 1, 8)])
        ranks = predict_run(literal(name, t=2, p=2), step)
        assert [counts(rows, operation="all_reduce") for rows in ranks] == [first, first, second, second]
        assert [counts(rows, operation="send") for rows in ranks] == [2, 2, 0, 0]
        assert [counts(rows, operation="all_gather") for rows in ranks] == [0, 0, 2, 2]
        assert [counts(rows, operation="gather") for rows in ranks] == [0, 0, 1, 1]

    def test_hybrid_bytes(self):
        ranks = predict_request(literal("8B", t=2, p=2), REQUEST, 2048)
        assert [wire(rows, operation="all_reduce") for rows in ranks] == [68_935_680] * 2 + [66_846_720] * 2
        assert [wire(rows, operation="send") for rows in ranks] == [2_088_960, 2_088_960, 0, 0]
        assert [wire(rows, operation="all_gather") for rows in ranks] == [0, 0, 2_088_960, 2_088_960]
        assert [payload(rows, operation="gather") for rows in ranks] == [0, 0, 16_416_768, 16_416_768]
        prefill = pick(ranks[1], operation="send", phase=Phase.PREFILL)
        assert [(row.count, row.payload_bytes) for row in prefill] == [(2, 2 * 524_288)]
        decode = pick(ranks[1], operation="send", phase=Phase.DECODE)
        assert [(row.count, row.payload_bytes) for row in decode] == [(2 * 127, 2 * 127 * 4_096)]

    @pytest.mark.parametrize("name", MODELS)
    @pytest.mark.parametrize("t", [1, 2, 4])
    @pytest.mark.parametrize("p", [1, 2, 4])
    @pytest.mark.parametrize("num_tensors", [1, 2])
    def test_hybrid_totals(self, name, t, p, num_tensors):
        """W, the sum on all wires, for both ways over a boundary and to the logits."""
        facts = MODELS[name]
        num_bytes = 255 * facts["hidden_size"] * BF16_BYTES
        num_layers = facts["num_hidden_layers"] // p
        all_reduce = sum((2 * num_layers + (stage == 0 and t > 1)) * num_bytes * 2 * (t - 1) for stage in range(p))
        logits = 128 * facts["vocab_size"] * BF16_BYTES
        sliced = literal(name, t=t, p=p, send_residual=num_tensors == 2)
        full = literal(name, t=t, p=p, send_residual=num_tensors == 2, slice_boundary=False, rules=LITERAL_TO_ALL_RULES)
        boundary = (p - 1) * num_tensors * num_bytes
        assert _total_wire(sliced) == (all_reduce + boundary + (t - 1) * boundary + Fraction((t - 1) * logits, t))
        assert _total_wire(full) == all_reduce + t * boundary + (t - 1) * logits

    def test_tensor_parallel_costs_2l_plus_1_times_as_much_as_pipeline_parallel(self):
        """The all-reduces alone, four ranks of either kind: 814,694,400 to 12,533,760 bytes."""
        tensor, pipeline = predict_request(literal("8B", t=4), REQUEST, 2048), literal("8B", p=4)
        all_reduces = sum(wire(rows, operation="all_reduce") for rows in tensor)
        assert (all_reduces, _total_wire(pipeline)) == (814_694_400, 12_533_760)
        assert all_reduces / _total_wire(pipeline) == 65


def _total_wire(layout):
    return sum(wire(rows) for rows in predict_request(layout, REQUEST, 2048))


class Wire:
    """Messages between ranks of one group, each counted where it leaves."""

    def __init__(self, world_size):
        self.sent = [0] * world_size
        self.world_size = world_size

    def send(self, source, to, num_bytes):
        assert source != to
        self.sent[source] += num_bytes

    def others(self, rank):
        return [peer for peer in range(self.world_size) if peer != rank]


def int8_groups(num_rows, row_size):
    """Values that share a scale: 64 of a row, or what is left of it."""
    rows = np.arange(num_rows * row_size).reshape(num_rows, row_size)
    return [group for row in rows for group in np.split(row, range(64, row_size, 64))]


def int8_bytes(groups):
    """A byte for each value, and four for each scale."""
    return sum(len(group) + 4 for group in groups)


def simulate_all_reduce(algorithm, shape, summand_bytes, sum_bytes, world_size):
    """Bytes that each rank sends, every message made; at the end each rank has every element of every rank."""
    wire, everybody, num_elements = Wire(world_size), set(range(world_size)), shape[0] * shape[1]
    parts = np.array_split(np.arange(num_elements), world_size)
    have = [[{rank} for _ in parts] for rank in range(world_size)]
    sizes = (lambda part: len(part) * summand_bytes), (lambda part: len(part) * sum_bytes)
    if algorithm == "two_shot_int8":
        groups = int8_groups(*shape)
        parts = [[groups[i] for i in part] for part in np.array_split(np.arange(len(groups)), world_size)]
        sizes = int8_bytes, int8_bytes
    if algorithm == "direct":
        for rank in range(world_size):
            for peer in wire.others(rank):
                wire.send(rank, peer, num_elements * summand_bytes)
        return wire.sent
    if algorithm == "ring":
        for step in range(2 * (world_size - 1)):
            before = [[set(part) for part in parts_of] for parts_of in have]
            for rank in range(world_size):
                index, peer = (rank - step) % world_size, (rank + 1) % world_size
                wire.send(rank, peer, sizes[step >= world_size - 1](parts[index]))
                have[peer][index] |= before[rank][index]
    else:
        for rank in range(world_size):
            for peer in wire.others(rank):
                wire.send(rank, peer, sizes[0](parts[peer]))
                have[peer][peer].add(rank)
        for rank in range(world_size):
            for peer in wire.others(rank):
                wire.send(rank, peer, sizes[1](parts[rank]))
                have[peer][rank] |= have[rank][rank]
    assert all(part == everybody for parts_of in have for part in parts_of)
    return wire.sent


class TestAlgorithms:
    @given(
        algorithm=st.sampled_from(["direct", "two_shot", "two_shot_int8", "ring"]),
        shape=st.tuples(st.integers(1, 9), st.integers(1, 300)),
        widths=st.tuples(st.sampled_from([1, 2, 4]), st.sampled_from([2, 4])),
        world_size=st.integers(2, 9),
    )
    def test_all_reduce_against_messages(self, algorithm, shape, widths, world_size):
        summands = Summands(num_rows=shape[0], row_size=shape[1], summand_bytes=widths[0], sum_bytes=widths[1])
        predicted = [all_reduce_wire_bytes(summands, algorithm, rank, world_size) for rank in range(world_size)]
        assert predicted == simulate_all_reduce(algorithm, shape, *widths, world_size)

    @given(st.integers(0, 10**6), st.integers(1, 16))
    def test_ring_and_two_shot_total_twice_what_the_others_hold(self, num_elements, world_size):
        summands = Summands(num_rows=1, row_size=num_elements, summand_bytes=2, sum_bytes=2)
        for algorithm in ("ring", "two_shot"):
            total = sum(all_reduce_wire_bytes(summands, algorithm, rank, world_size) for rank in range(world_size))
            assert total == 2 * (world_size - 1) * summands.payload_bytes

    def test_unknown_algorithm(self):
        with pytest.raises(ValueError, match="'tree' is no algorithm"):
            all_reduce_wire_bytes(Summands(num_rows=1, row_size=1, summand_bytes=2, sum_bytes=2), "tree", 0, 2)

    @pytest.mark.parametrize(("world_size", "limit"), [(2, 256 * 1024), (3, 2 * 1024), (8, 2 * 1024)])
    def test_large_messages_go_in_two_shots(self, world_size, limit):
        for num_bytes, expected in ((limit, "direct"), (limit + 1, "two_shot")):
            summands = Summands(num_rows=1, row_size=num_bytes, summand_bytes=1, sum_bytes=1)
            assert all_reduce_algorithm(summands, world_size) == expected

    @pytest.mark.parametrize(("world_size", "below"), [(2, "direct"), (3, "two_shot")])
    def test_large_messages_may_go_in_8_bits(self, world_size, below):
        for num_elements, expected in ((16 * 1024 - 1, below), (16 * 1024, "two_shot_int8")):
            summands = Summands(num_rows=num_elements, row_size=1, summand_bytes=4, sum_bytes=2, may_quantize=True)
            assert all_reduce_algorithm(summands, world_size) == expected


class Simulation:
    """An engine that makes every call of every rank, and counts what each rank hands over and sends."""

    def __init__(self, hf_config, parallel, activation_bytes, *, literal=False):
        self.hf, self.parallel, self.activation_bytes, self.literal = hf_config, parallel, activation_bytes, literal
        self.t, self.p = parallel.tensor_parallel_size, parallel.pipeline_parallel_size
        self.rows = [defaultdict(lambda: [0, 0, 0]) for _ in range(self.t * self.p)]
        self.phase = Phase.PREFILL

    def count(self, rank, operation, group, site, algorithm, payload_bytes, wire_bytes):
        row = self.rows[rank][operation, group, site, self.phase, algorithm]
        row[0] += 1
        row[1] += payload_bytes
        row[2] += wire_bytes

    def stage_ranks(self, stage):
        return list(range(stage * self.t, (stage + 1) * self.t))

    def all_reduce(self, stage, site, shape, element_bytes):
        if self.t == 1:
            return
        payload_bytes = shape[0] * shape[1] * element_bytes
        algorithm = self.algorithm(payload_bytes)
        sent = simulate_all_reduce(algorithm, shape, element_bytes, self.activation_bytes, self.t)
        for rank, num_bytes in zip(self.stage_ranks(stage), sent, strict=True):
            self.count(rank, "all_reduce", "tp", site, algorithm, payload_bytes, num_bytes)

    def algorithm(self, payload_bytes):
        if self.literal:
            return "ring"
        if self.parallel.all_reduce_dtype is AllReduceDtype.INT8 and payload_bytes >= 65536:
            return "two_shot_int8"
        return "direct" if payload_bytes <= (262144 if self.t == 2 else 2048) else "two_shot"

    def all_gather(self, stage, site, part_bytes):
        if self.t == 1:
            return
        wire = Wire(self.t)
        for rank in range(self.t):
            for peer in wire.others(rank):
                wire.send(rank, peer, part_bytes[rank])
        for i, rank in enumerate(self.stage_ranks(stage)):
            self.count(rank, "all_gather", "tp", site, "direct", part_bytes[i], wire.sent[i])

    def boundary(self, stage, num_tokens):
        hidden_size, site = self.hf["hidden_size"], f"boundary.{stage}"
        for _ in range(2 if self.parallel.send_residual else 1):
            # Cut where each rank can have as much.
            is_sliced = self.parallel.slice_boundary and hidden_size % self.t == 0
            num_elements = num_tokens * hidden_size // (self.t if is_sliced else 1)
            num_bytes = [num_elements * self.activation_bytes] * self.t
            for i, (source, to) in enumerate(zip(self.stage_ranks(stage), self.stage_ranks(stage + 1), strict=True)):
                self.count(source, "send", "pp", site, "point_to_point", num_bytes[i], num_bytes[i])
                self.count(to, "recv", "pp", site, "point_to_point", num_bytes[i], 0)
            if is_sliced:
                self.all_gather(stage + 1, site, num_bytes)

    def context(self, stage, layer, num_tokens):
        """Ranks of a stage in runs, each of which has one KV head."""
        num_kv_heads = self.hf.get("num_key_value_heads", 12)
        if self.parallel.kv_sharding is KvSharding.REPLICATED or self.t <= num_kv_heads:
            return
        head_dim = self.hf.get("head_dim", self.hf["hidden_size"] // 12)
        for sharers in np.split(np.array(self.stage_ranks(stage)), num_kv_heads):
            heads = dict(zip(sharers, np.split(np.arange(12 // num_kv_heads), len(sharers)), strict=True))
            for rank in sharers:
                site = f"layers.{layer}.context"
                sent, scattered, normalizers = 0, 0, num_tokens * sum(map(len, heads.values())) * 8
                query = num_tokens * len(heads[rank]) * head_dim * self.activation_bytes
                for peer in sharers:
                    numerators = num_tokens * len(heads[peer]) * head_dim * self.activation_bytes
                    scattered += numerators
                    sent += numerators if peer != rank else 0
                others = len(sharers) - 1
                self.count(rank, "all_gather", "kv", site, "direct", query, others * query)
                self.count(rank, "all_gather", "kv", site, "direct", normalizers, others * normalizers)
                if self.parallel.kv_sharding is KvSharding.SEQUENCE:
                    self.count(rank, "reduce_scatter", "kv", site, "direct", scattered, sent)

    def layers(self, phase, num_tokens, num_layers_of):
        self.phase = phase
        settings = self.parallel
        summand_bytes = {AllReduceDtype.FLOAT32: 4, AllReduceDtype.BFLOAT16: 2}.get(
            settings.all_reduce_dtype, self.activation_bytes
        )
        if settings.shard_embedding:
            width = self.hf.get("word_embed_proj_dim", self.hf["hidden_size"])
            self.all_reduce(0, "embedding", (num_tokens, width), self.activation_bytes)
        layer = 0
        for stage, num_layers in enumerate(num_layers_of):
            if stage:
                self.boundary(stage - 1, num_tokens)
            for _ in range(num_layers):
                self.context(stage, layer, num_tokens)
                for part in ("attention", "mlp"):
                    is_mixture = part == "mlp" and "num_local_experts" in self.hf
                    self.all_reduce(
                        stage,
                        f"layers.{layer}.{part}",
                        (num_tokens, self.hf["hidden_size"]),
                        self.activation_bytes if is_mixture else summand_bytes,
                    )
                layer += 1

    def sample(self, rows):
        if self.parallel.gather_logits:
            self.whole(rows)
            return
        self.phase = rows.phase
        self.all_gather(self.p - 1, "candidates", [rows.candidate_bytes] * self.t)
        if rows.draw_bytes > 0:
            self.all_gather(self.p - 1, "candidates", [rows.draw_bytes] * self.t)

    def whole(self, rows):
        self.phase = rows.phase
        # Cut between panels of 16 tokens, the last of which may be shorter.
        vocabulary = np.arange(self.hf["vocab_size"])
        panels = np.array_split(np.arange(0, len(vocabulary), 16), self.t)
        shards = [[token for start in starts for token in vocabulary[start : start + 16]] for starts in panels]
        width = self.activation_bytes if self.parallel.gather_logits else 4
        part_bytes = [rows.num_rows * len(shard) * width for shard in shards]
        if not self.literal:
            self.all_gather(self.p - 1, "logits", part_bytes)
        elif self.t > 1:
            for i, rank in enumerate(self.stage_ranks(self.p - 1)):
                self.count(rank, "gather", "tp", "logits", "direct", part_bytes[i], part_bytes[i] if i else 0)


SMALL = LLAMA | {"intermediate_size": 64, "num_attention_heads": 12, "num_key_value_heads": 12, "head_dim": 4}
SMALL_OPT = {
    "architectures": ["OPTForCausalLM"],
    "activation_function": "relu",
    "max_position_embeddings": 2048,
    "do_layer_norm_before": False,
    "ffn_dim": 64,
    "num_attention_heads": 12,
    "word_embed_proj_dim": 10,
}
SMALL_MIXTRAL = SMALL | {
    "architectures": ["MixtralForCausalLM"],
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
}
FAMILIES = [(SMALL, [36, 37, 48, 100]), (SMALL_OPT, [36, 48]), (SMALL_MIXTRAL, [37, 48])]


@st.composite
def small_models(draw):
    family, hidden_sizes = draw(st.sampled_from(FAMILIES))
    return (
        family
        | {
            "hidden_size": draw(st.sampled_from(hidden_sizes)),
            "num_hidden_layers": draw(st.integers(1, 5)),
            "vocab_size": draw(st.integers(12, 130)),
        }
        | ({"num_key_value_heads": draw(st.sampled_from([1, 2, 3, 6, 12]))} if "num_key_value_heads" in family else {})
    )


def _divides(t, num_kv_heads):
    return num_kv_heads % t == 0 or t % num_kv_heads == 0


@st.composite
def layouts(draw, hf_config):
    num_layers, num_kv_heads = hf_config["num_hidden_layers"], hf_config.get("num_key_value_heads", 12)
    p = draw(st.integers(1, num_layers))
    cuts = sorted(draw(st.permutations(range(1, num_layers)))[: p - 1])
    sizes = tuple(stop - start for start, stop in zip([0, *cuts], [*cuts, num_layers], strict=True))
    flags = draw(st.tuples(*[st.booleans()] * 4))
    return ParallelConfig(
        tensor_parallel_size=draw(st.sampled_from([t for t in (1, 2, 3, 4, 6, 12) if _divides(t, num_kv_heads)])),
        kv_sharding=draw(st.sampled_from(KvSharding)),
        pipeline_parallel_size=p,
        pipeline_layers=sizes,
        all_reduce_dtype=draw(st.sampled_from(AllReduceDtype)),
        **dict(zip(("shard_embedding", "send_residual", "slice_boundary", "gather_logits"), flags, strict=True)),
    )


phases = st.sampled_from(Phase)
num_tokens = st.one_of(st.integers(1, 40), st.integers(1, 3000))
passes = st.builds(ForwardPass, phases, num_tokens)
sampled = st.builds(SampledRows, phases, st.integers(1, 70), st.integers(1, 9999), st.integers(0, 300))
events_of_runs = st.one_of(passes, sampled, st.builds(WholeRows, phases, st.integers(1, 64)))


def as_rows(simulation, rank):
    return {
        VolumeRow(
            operation=operation,
            group=group,
            site=site,
            phase=phase,
            algorithm=algorithm,
            count=count,
            payload_bytes=payload_bytes,
            wire_bytes=wire_bytes,
        )
        for (operation, group, site, phase, algorithm), (count, payload_bytes, wire_bytes) in simulation.rows[
            rank
        ].items()
    }


class TestAgainstSimulation:
    @settings(deadline=None)
    @given(data=st.data(), hf_config=small_models(), is_literal=st.booleans(), activation_bytes=st.sampled_from([2, 4]))
    def test_every_call_of_every_rank(self, data, hf_config, is_literal, activation_bytes):
        parallel = data.draw(layouts(hf_config))
        events = data.draw(st.lists(events_of_runs, min_size=1, max_size=8))
        self.check(hf_config, parallel, activation_bytes, events, is_literal=is_literal)

    @pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family[0]["architectures"][0])
    @pytest.mark.parametrize("dtype", AllReduceDtype)
    @pytest.mark.parametrize("activation_bytes", [2, 4])
    def test_every_family_and_type(self, family, dtype, activation_bytes):
        """Whatever a random layout may have left out."""
        hf_config = family[0] | {"hidden_size": 36, "num_hidden_layers": 3, "vocab_size": 97}
        events = [ForwardPass(Phase.PREFILL, 1001), ForwardPass(Phase.DECODE, 3), SampledRows(Phase.DECODE, 3, 24, 4)]
        for t in (2, 3):
            parallel = replace(
                LITERAL,
                tensor_parallel_size=t,
                pipeline_parallel_size=2,
                pipeline_layers=(2, 1),
                gather_logits=False,
                all_reduce_dtype=dtype,
            )
            self.check(hf_config, parallel, activation_bytes, events)

    @staticmethod
    def check(hf_config, parallel, activation_bytes, events, *, is_literal=False):
        if is_literal:
            parallel = replace(parallel, all_reduce_dtype=AllReduceDtype.AUTO, gather_logits=True)
        rules = LITERAL_RULES if is_literal else WireRules()
        layout = Layout(model=model(hf_config), parallel=parallel, activation_bytes=activation_bytes, rules=rules)
        simulation = Simulation(hf_config, parallel, activation_bytes, literal=is_literal)
        for event in events:
            match event:
                case ForwardPass():
                    simulation.layers(event.phase, event.num_tokens, parallel.pipeline_layers)
                case SampledRows():
                    simulation.sample(event)
                case WholeRows():
                    simulation.whole(event)
        predicted = predict_run(layout, Counter(events))
        for rank, rows in enumerate(predicted):
            assert len(set(rows)) == len(rows)
            assert set(rows) == as_rows(simulation, rank)
            by_kind: dict[ExchangeKind, Sums] = {}
            for row in rows:
                kind = ExchangeKind(row.group, row.operation, row.phase)
                add_totals(by_kind, {kind: Sums(row.count, row.payload_bytes, row.wire_bytes)})
            assert RankVolume(layout, rank).totals(Counter(events)) == by_kind

    @given(hf_config=small_models(), events=st.lists(events_of_runs))
    def test_one_rank_exchanges_nothing(self, hf_config, events):
        """Nor does it with every literal flag."""
        for parallel in (ParallelConfig(), LITERAL):
            layout = Layout(model=model(hf_config), parallel=parallel, activation_bytes=2)
            assert predict_run(layout, Counter(events)) == [[]]

    @given(hf_config=small_models(), event=events_of_runs, data=st.data())
    def test_what_is_sent_is_received(self, hf_config, event, data):
        parallel = data.draw(layouts(hf_config))
        layout = Layout(model=model(hf_config), parallel=parallel, activation_bytes=2)
        ranks = predict_run(layout, Counter([event]))
        everything = [row for rows in ranks for row in rows]
        for column in (counts, payload):
            assert column(everything, operation="send") == column(everything, operation="recv")


def scheduled_run(request, max_num_batched_tokens, max_in_flight, block_size):
    """The run of a real scheduler, whose plans come back in order and whose sequences end at their length."""
    num_blocks = request.batch_size * -(-(request.prompt_tokens + request.output_tokens) // block_size)
    config = SchedulerConfig(
        max_num_seqs=request.batch_size, max_num_batched_tokens=max_num_batched_tokens, max_model_len=10**6
    )
    # Its reserve of a block for each running sequence is no limit to a cache with room for all.
    scheduler = Scheduler(config, BlockManager(num_blocks + request.batch_size, block_size, True), max_in_flight)
    sequences = {}
    for seq_id in range(request.batch_size):
        sequences[seq_id] = Sequence(
            seq_id=seq_id,
            request_id=str(seq_id),
            prompt_token_ids=(seq_id, *range(1, request.prompt_tokens)),
            params=SamplingParams(max_tokens=request.output_tokens),
            seed=0,
        )
        scheduler.add(sequences[seq_id])
    run, in_flight = Counter(), []
    while scheduler.has_unfinished:
        while len(in_flight) < max_in_flight:
            plan = scheduler.schedule()
            if plan is None:
                break
            in_flight.append(plan)
            phase = Phase.DECODE if plan.num_decode_tokens == plan.num_tokens else Phase.PREFILL
            num_rows = sum(chunk.samples for chunk in plan.chunks)
            run[ForwardPass(phase, plan.num_tokens)] += 1
            if num_rows:
                run[SampledRows(phase, num_rows, 8 * num_rows)] += 1
        plan = in_flight.pop(0)
        sampled = {chunk.seq_id: 0 for chunk in plan.chunks if chunk.samples}
        scheduler.update(plan, sampled)
        for seq_id in sampled:
            if len(sequences[seq_id].output_token_ids) == request.output_tokens:
                scheduler.finish(sequences[seq_id], FinishReason.LENGTH)
    return run


class TestRequests:
    @settings(deadline=None)
    @given(
        prompt_tokens=st.one_of(st.integers(1, 40), st.integers(1, 600)),
        output_tokens=st.integers(1, 12),
        batch_size=st.integers(1, 9),
        room=st.one_of(st.integers(0, 60), st.integers(0, 3000)),
        max_in_flight=st.integers(1, 4),
        block_size=st.sampled_from([1, 4, 16]),
    )
    def test_steps_are_those_of_the_scheduler(
        self, prompt_tokens, output_tokens, batch_size, room, max_in_flight, block_size
    ):
        request = RequestShape(prompt_tokens=prompt_tokens, output_tokens=output_tokens, batch_size=batch_size)
        run = request_run(request, batch_size + room, max_in_flight)
        assert run == scheduled_run(request, batch_size + room, max_in_flight, block_size)
        assert (
            sum(event.num_tokens * n for event, n in run.items() if isinstance(event, ForwardPass))
            == request.num_tokens
        )

    @pytest.mark.parametrize(
        ("max_num_batched_tokens", "num_chunks"), [(2048, 1), (128, 1), (127, 2), (32, 4), (1, 128)]
    )
    def test_chunks_change_counts_but_not_bytes(self, max_num_batched_tokens, num_chunks):
        whole = predict_request(literal("8B", t=2, p=2), REQUEST, 2048)
        chunked = predict_request(literal("8B", t=2, p=2), REQUEST, max_num_batched_tokens)
        for mine, its in zip(whole, chunked, strict=True):
            assert (payload(mine), wire(mine)) == (payload(its), wire(its))
            prefill = {"operation": "all_reduce", "phase": Phase.PREFILL}
            assert counts(its, **prefill) == num_chunks * counts(mine, **prefill)

    def test_chunks_may_change_the_algorithm(self):
        """128 tokens are sent in two shots among four ranks, one at a time directly: twice the bytes."""
        layout = Layout(
            model=model(LLAMA_8B | {"hidden_size": 1024}),
            parallel=ParallelConfig(tensor_parallel_size=4),
            activation_bytes=BF16_BYTES,
        )
        whole, chunked = (
            pick(predict_request(layout, REQUEST, n)[0], operation="all_reduce", phase=Phase.PREFILL) for n in (128, 1)
        )
        assert payload(whole) == payload(chunked)
        assert 2 * wire(whole) == wire(chunked)
        assert ({row.algorithm for row in whole}, {row.algorithm for row in chunked}) == ({"two_shot"}, {"direct"})

    @pytest.mark.parametrize(
        ("transport", "algorithms"),
        [
            (Transport.AUTO, {"two_shot"}),
            (Transport.SHM, {"two_shot"}),
            (Transport.MPI, {"two_shot"}),
            (Transport.GLOO, {"direct"}),
            (Transport.NCCL, {"ring"}),
        ],
    )
    def test_a_transport_has_its_algorithms(self, transport, algorithms):
        parallel = ParallelConfig(tensor_parallel_size=4, transport=transport)
        layout = Layout(
            model=model(LLAMA_8B), parallel=parallel, activation_bytes=BF16_BYTES, rules=rules_of(transport)
        )
        rows = pick(predict_request(layout, REQUEST, 128)[0], operation="all_reduce")
        assert {row.algorithm for row in rows} == algorithms

    def test_gloo_hands_all_rows_to_every_rank(self):
        """16 ranks on 8 KV heads, in pairs: of two rows each keeps one, and gloo sends both."""
        parallel = ParallelConfig(tensor_parallel_size=16, kv_sharding=KvSharding.SEQUENCE)
        row_bytes = 2 * 128 * BF16_BYTES
        for transport, num_bytes in ((Transport.SHM, row_bytes), (Transport.GLOO, 2 * row_bytes)):
            layout = Layout(
                model=model(LLAMA_8B), parallel=parallel, activation_bytes=BF16_BYTES, rules=rules_of(transport)
            )
            for rows in predict_run(layout, Counter([ForwardPass(Phase.DECODE, 1)])):
                scattered = pick(rows, operation="reduce_scatter")
                assert len(scattered) == 32
                assert {(row.payload_bytes, row.wire_bytes) for row in scattered} == {(2 * row_bytes, num_bytes)}

    def test_no_room_for_a_token_of_each(self):
        request = RequestShape(prompt_tokens=5, output_tokens=5, batch_size=4)
        with pytest.raises(ConfigError, match=r"max_num_batched_tokens is 3, .* allowed: 4 and more"):
            request_run(request, 3)

    @pytest.mark.parametrize("name", ["prompt_tokens", "output_tokens", "batch_size"])
    def test_nothing_to_do(self, name):
        with pytest.raises(ConfigError, match=f"{name} is 0"):
            RequestShape(**({"prompt_tokens": 1, "output_tokens": 1} | {name: 0}))


class TestLayouts:
    def test_heads_that_do_not_divide(self):
        parallel = ParallelConfig(tensor_parallel_size=3)
        with pytest.raises(ParallelismError, match="sizes that work: 1, 2, 4, 8, 16, 32"):
            Layout(model=model(LLAMA_8B), parallel=parallel, activation_bytes=2)

    def test_more_stages_than_layers(self):
        parallel = ParallelConfig(pipeline_parallel_size=33)
        with pytest.raises(ParallelismError, match="pipeline_parallel_size 33 is more than the model's 32 layers"):
            Layout(model=model(LLAMA_8B), parallel=parallel, activation_bytes=2)


ROW = VolumeRow(
    operation="all_reduce",
    group="tp",
    site="layers.0.mlp",
    phase=Phase.DECODE,
    algorithm="direct",
    count=3,
    payload_bytes=6000,
    wire_bytes=12000,
)


class TestDifferences:
    def test_none(self):
        other = replace(ROW, site="layers.1.mlp")
        assert list(differences([ROW, other], [other, ROW])) == []

    def test_a_row_may_come_in_parts(self):
        parts = [replace(ROW, count=1, payload_bytes=2000, wire_bytes=n) for n in (4000, 5000, 3000)]
        assert list(differences([ROW], parts)) == []

    def test_rows_without_calls_are_as_good_as_absent(self):
        assert list(differences([], [replace(ROW, count=0, payload_bytes=0, wire_bytes=0)])) == []

    @pytest.mark.parametrize("name", ["count", "payload_bytes", "wire_bytes"])
    def test_one_figure(self, name):
        counted = replace(ROW, **{name: getattr(ROW, name) + 1})
        (line,) = differences([ROW], [counted])
        assert line.startswith("decode tp layers.0.mlp all_reduce direct: ")
        assert f"{name} is {getattr(counted, name):,}, predicted {getattr(ROW, name):,}" in line

    @pytest.mark.parametrize("change", [{"algorithm": "two_shot"}, {"phase": Phase.PREFILL}, {"site": "embedding"}])
    def test_another_place(self, change):
        """All three figures are missing in one place and too much in the other."""
        assert len(list(differences([ROW], [replace(ROW, **change)]))) == 6
