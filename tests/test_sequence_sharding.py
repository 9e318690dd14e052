"""Ranks that split the contexts of a KV head among them, against one rank that has it all."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints import BY_NAME, HAS_NATIVE, MAX_LEN, make_pool, random_tokens
from hypothesis import given
from hypothesis import strategies as st
from test_parallel import thread_groups
from torch import Tensor

from headrace.cache.kv_share import KvShare
from headrace.config import KvSharding, LoadConfig, ParallelConfig, SoftmaxScheme
from headrace.costs.sites import Site
from headrace.engine.rows import Row, build_forward_batch
from headrace.engine.runner import ModelRunner
from headrace.kernels import NOT_STORED, KernelChoice, SoftmaxSpec, resolve_kernels
from headrace.layers.context import LayerContext
from headrace.models.source import ModelSource, load_decoder, open_model, resolve_formats
from headrace.parallel.group import Group, OneRankGroup

native = pytest.mark.skipif(not HAS_NATIVE, reason="the native module is not built")

BLOCK_SIZE, NUM_BLOCKS = 4, 61
SPLIT = [KvSharding.SEQUENCE, KvSharding.SEQUENCE_FUSED]
SYNCHRONIZED = SoftmaxSpec()
each_sharding = pytest.mark.parametrize("sharding", SPLIT, ids=lambda s: s.value)


class TestKvShare:
    @given(num_blocks=st.integers(1, 200), world_size=st.integers(1, 9))
    def test_blocks_are_a_partition_without_holes(self, num_blocks, world_size):
        held = []
        for rank in range(world_size):
            share = KvShare(rank=rank, world_size=world_size)
            local = [share.local_block(block_id) for block_id in range(num_blocks)]
            mine = [block for block in local if block is not None]
            assert mine == list(range(len(mine)))
            assert len(mine) <= share.num_local_blocks(num_blocks)
            held += [block_id for block_id in range(num_blocks) if local[block_id] is not None]
        assert sorted(held) == list(range(num_blocks))

    @given(table=st.lists(st.integers(0, 500), unique=True, max_size=40), world_size=st.integers(1, 5))
    def test_local_tables_and_counts(self, table, world_size):
        ids = np.array(table, dtype=np.int32)
        for rank in range(world_size):
            share = KvShare(rank=rank, world_size=world_size)
            local, counts = share.local_table(ids)
            assert local.tolist() == [block for i in table if (block := share.local_block(i)) is not None]
            assert counts.tolist() == [len(share.local_table(ids[:i])[0]) for i in range(len(table) + 1)]
            assert local.dtype == counts.dtype == np.int32

    @given(data=st.data(), world_size=st.integers(1, 4))
    def test_each_token_of_a_batch_is_stored_by_one_rank(self, data, world_size):
        order = data.draw(st.permutations(range(30)))
        rows = []
        for _ in range(data.draw(st.integers(1, 4))):
            start, count = data.draw(st.integers(0, 9)), data.draw(st.integers(1, 9))
            blocks = -(-(start + count) // BLOCK_SIZE)
            rows.append(Row([0] * count, start, np.array(order[:blocks], dtype=np.int32)))
            order = order[blocks:]
        whole = build_forward_batch(rows, BLOCK_SIZE).slot_mapping
        found = torch.full_like(whole, NOT_STORED)
        for rank in range(world_size):
            slots = build_forward_batch(rows, BLOCK_SIZE, KvShare(rank=rank, world_size=world_size)).slot_mapping
            is_mine = slots != NOT_STORED
            assert (found[is_mine] == NOT_STORED).all()
            block, offset = slots // BLOCK_SIZE, slots % BLOCK_SIZE
            found[is_mine] = ((block * world_size + rank) * BLOCK_SIZE + offset)[is_mine]
        assert torch.equal(found, whole)


@dataclass(frozen=True, kw_only=True)
class Setup:
    """How the ranks of a test are put together."""

    sharding: KvSharding = KvSharding.REPLICATED
    softmax: SoftmaxSpec = SYNCHRONIZED
    kernels: KernelChoice = KernelChoice.AUTO

    def runner(self, source: ModelSource, tp_group: Group, kv_group: Group, stream_groups: Callable | None = None):
        """stream_groups: makes both groups once the kernels are known, instead."""
        kernels = resolve_kernels(self.kernels)
        if stream_groups is not None:
            tp_group, kv_group = stream_groups(kernels)
        context = LayerContext(
            kernels=kernels,
            tp_group=tp_group,
            kv_group=kv_group,
            parallel=ParallelConfig(tensor_parallel_size=tp_group.world_size, kv_sharding=self.sharding),
            softmax=(self.softmax,) * source.config.num_hidden_layers,
        )
        formats = resolve_formats(source, LoadConfig(model=str(source.folder)))
        decoder = load_decoder(source, context, formats, max_model_len=MAX_LEN, progress=lambda _: None)
        share = None
        if self.sharding.splits_contexts and kv_group.world_size > 1:
            share = KvShare(rank=kv_group.rank, world_size=kv_group.world_size)
        num_kv_heads = max(1, source.config.attention.num_kv_heads // tp_group.world_size)
        num_blocks = NUM_BLOCKS if share is None else share.num_local_blocks(NUM_BLOCKS)
        pool = make_pool(decoder, num_blocks=num_blocks, block_size=BLOCK_SIZE, num_kv_heads=num_kv_heads)
        return ModelRunner(decoder, pool, MAX_LEN, share=share)


def steps_of_a_busy_engine() -> list[list[Row]]:
    """Chunked prompts beside decoding sequences, a prefix that two share, contexts of one token and of one block, and
    blocks in no order."""
    order = np.random.default_rng(0).permutation(NUM_BLOCKS).astype(np.int32)
    a_table, b_table, one_table, block_table = order[:10], order[10:22], order[22:23], order[23:24]
    c_table = np.concatenate([a_table[:4], order[24:30]])
    tokens = random_tokens(200, seed=3)
    a, b, c = tokens[:40], tokens[40:88], tokens[:16] + tokens[100:124]
    steps = [
        [Row(a[:13], 0, a_table)],
        [Row(a[13:29], 13, a_table), Row(b[:5], 0, b_table)],
        [Row(a[29:30], 29, a_table), Row(tokens[50:51], 0, one_table), Row(b[5:41], 5, b_table)],
        # The first four blocks are those of a: nobody computes them again.
        [Row(a[30:31], 30, a_table), Row(b[41:42], 41, b_table), Row(c[16:30], 16, c_table)],
        [Row(tokens[60:64], 0, block_table)],
    ]
    for i in range(3):
        steps.append(
            [
                Row(a[31 + i : 32 + i], 31 + i, a_table),
                Row(b[42 + i : 43 + i], 42 + i, b_table),
                Row(c[30 + i : 31 + i], 30 + i, c_table),
            ]
        )
    return steps


def run_steps(runner: ModelRunner, steps: Sequence[Sequence[Row]]) -> list[tuple[Tensor, Tensor]]:
    """Hidden states and this rank's logits of every step."""
    found = []
    for rows in steps:
        hidden_states = runner.run(rows)
        logits = runner.logits(hidden_states).logits.clone()
        found.append((hidden_states.clone(), logits))
    return found


def run_alone(source: ModelSource, setup: Setup) -> list[tuple[Tensor, Tensor]]:
    return run_steps(setup.runner(source, OneRankGroup(), OneRankGroup("kv")), steps_of_a_busy_engine())


def groups_of(source: ModelSource, world_size: int) -> list[tuple[Group, Group]]:
    """The tp group and the KV group of every rank."""
    size = max(1, world_size // source.config.attention.num_kv_heads)
    kv_groups = [group for _ in range(world_size // size) for group in thread_groups(size)]
    return list(zip(thread_groups(world_size), kv_groups, strict=True))


def on_threads(groups: Sequence[tuple[Group, Group]], work: Callable) -> list:
    with ThreadPoolExecutor(len(groups)) as pool:
        return list(pool.map(lambda pair: work(*pair), groups))


def assert_agree(ranks: list[list[tuple[Tensor, Tensor]]], expected: list[tuple[Tensor, Tensor]]) -> None:
    for step, (hidden_states, logits) in enumerate(expected):
        scale = float(hidden_states.abs().max())
        for rank, found in enumerate(ranks):
            assert (found[step][0] - hidden_states).abs().max() < 2e-5 * scale, f"step {step}, rank {rank}"
        together = torch.cat([found[step][1] for found in ranks], dim=1)
        assert torch.equal(together.argmax(1), logits.argmax(1)), f"step {step}"


def check(folder: Path, name: str, world_size: int, setup: Setup) -> None:
    BY_NAME[name].write(folder)
    source = open_model(folder)
    expected = run_alone(source, Setup(kernels=setup.kernels))
    ranks = on_threads(
        groups_of(source, world_size),
        lambda tp, kv: run_steps(setup.runner(source, tp, kv), steps_of_a_busy_engine()),
    )
    assert_agree(ranks, expected)


LAYOUTS = [
    ("chatglm2", 4),  # two KV heads
    ("chatglm3", 4),
    ("chatglm-biases-layer-norm", 4),
    ("llama-one-kv-head", 2),
    ("llama-one-kv-head", 4),
    ("llama-gqa", 4),
    ("qwen3", 4),
    ("gemma2", 4),  # sliding windows and soft caps
    ("llama-gqa", 2),  # nothing to split: a KV head for each rank
]


@each_sharding
@pytest.mark.parametrize(("name", "world_size"), LAYOUTS, ids=[f"{name}-{size}" for name, size in LAYOUTS])
def test_ranks_give_the_hidden_states_and_tokens_of_one(tmp_path, name, world_size, sharding):
    check(tmp_path, name, world_size, Setup(sharding=sharding))


@each_sharding
@pytest.mark.parametrize(("name", "world_size"), [("chatglm3", 4), ("llama-one-kv-head", 4), ("gemma2", 4)])
def test_with_the_reference_kernels(tmp_path, name, world_size, sharding):
    check(tmp_path, name, world_size, Setup(sharding=sharding, kernels=KernelChoice.REFERENCE))


SOFTMAX = {
    "lazy": SoftmaxSpec(scheme=SoftmaxScheme.LAZY),
    "asynchronized": SoftmaxSpec(scheme=SoftmaxScheme.ASYNCHRONIZED, unified_max=1.0),
    "all_out_of_range": SoftmaxSpec(scheme=SoftmaxScheme.ASYNCHRONIZED, unified_max=1000.0),
    "some_out_of_range": SoftmaxSpec(scheme=SoftmaxScheme.ASYNCHRONIZED, unified_max=0.0, element_bounds=(-2.0, 2.0)),
}


@native
@each_sharding
@pytest.mark.parametrize("softmax", SOFTMAX)
@pytest.mark.parametrize("name", ["chatglm3", "llama-one-kv-head"])
def test_every_softmax_scheme(tmp_path, name, softmax, sharding):
    check(tmp_path, name, 4, Setup(sharding=sharding, softmax=SOFTMAX[softmax]))


@native
def test_ranks_recompute_different_rows_and_still_agree(tmp_path):
    """Otherwise the case above would not test a sum of shares that refer to different maxima."""
    BY_NAME["llama-one-kv-head"].write(tmp_path)
    source = open_model(tmp_path)
    setup = Setup(sharding=KvSharding.SEQUENCE_FUSED, softmax=SOFTMAX["some_out_of_range"])

    def counts(tp: Group, kv: Group):
        runner = setup.runner(source, tp, kv)
        run_steps(runner, steps_of_a_busy_engine())
        return [(c.num_rows, c.num_recomputed_rows) for c in runner._kv_pool.softmax_counts()]

    found = on_threads(groups_of(source, 4), counts)
    assert all(0 < again < rows for rank in found for rows, again in rank)
    assert len({tuple(rank) for rank in found}) > 1


@each_sharding
def test_each_rank_stores_its_share_alone(tmp_path, sharding):
    """Together the ranks of a KV head hold each token's key and value once, and each rank's pool has room for its share
    only."""
    BY_NAME["llama-one-kv-head"].write(tmp_path)
    source = open_model(tmp_path)
    setup, steps = Setup(sharding=sharding), steps_of_a_busy_engine()

    def stored(tp: Group, kv: Group) -> Tensor:
        runner = setup.runner(source, tp, kv)
        run_steps(runner, steps)
        pool = runner._kv_pool
        assert pool.spec.num_blocks == -(-NUM_BLOCKS // 4)
        slots = torch.arange(pool.spec.num_slots)
        written = ~runner._decoder.kernels.read_kv(pool.layers[0], slots)[0].isnan().flatten(1).any(1)
        block, offset = slots // BLOCK_SIZE, slots % BLOCK_SIZE
        return ((block * 4 + kv.rank) * BLOCK_SIZE + offset)[written]

    found = torch.cat(on_threads(groups_of(source, 4), stored)).tolist()
    batches = [build_forward_batch(rows, BLOCK_SIZE) for rows in steps]
    assert sorted(found) == sorted(set(torch.cat([batch.slot_mapping for batch in batches]).tolist()))


class CountingGroup:
    """Bytes that a rank hands over at a site, as the ledger counts them on its wire with direct exchange."""

    def __init__(self, group: Group, sent: dict[tuple[str, str], int]) -> None:
        self._group, self._sent = group, sent
        self.rank, self.world_size = group.rank, group.world_size

    def _count(self, operation: str, site: str, num_bytes: int) -> None:
        key = operation, site
        self._sent[key] = self._sent.get(key, 0) + num_bytes

    def all_gather(self, tensor: Tensor, site: str, sizes=None) -> list[Tensor]:
        assert tensor.is_contiguous()
        self._count("all_gather", site, (self.world_size - 1) * tensor.nbytes)
        return self._group.all_gather(tensor, site, sizes)

    def reduce_scatter(self, tensor: Tensor, site: str) -> Tensor:
        assert tensor.is_contiguous()
        self._count("reduce_scatter", site, tensor.nbytes // self.world_size * (self.world_size - 1))
        return self._group.reduce_scatter(tensor, site)


@each_sharding
@pytest.mark.parametrize(("name", "world_size"), [("chatglm3", 4), ("llama-one-kv-head", 4), ("llama-one-kv-head", 2)])
def test_bytes_are_those_of_the_closed_form(tmp_path, name, world_size, sharding):
    BY_NAME[name].write(tmp_path)
    source = open_model(tmp_path)
    attention, num_tokens = source.config.attention, sum(len(r.token_ids) for s in steps_of_a_busy_engine() for r in s)
    size = world_size // attention.num_kv_heads
    heads, element_bytes = attention.num_heads // world_size, 4

    def sent(tp: Group, kv: Group) -> dict[tuple[str, str], int]:
        counts: dict[tuple[str, str], int] = {}
        runner = Setup(sharding=sharding).runner(source, tp, CountingGroup(kv, counts))
        run_steps(runner, steps_of_a_busy_engine())
        return counts

    queries = (size - 1) * heads * attention.head_dim * element_bytes
    normalizers = (size - 1) * size * heads * 8
    expected = {}
    for layer in range(source.config.num_hidden_layers):
        expected["all_gather", Site.context(layer)] = num_tokens * (queries + normalizers)
        if sharding is KvSharding.SEQUENCE:
            expected["reduce_scatter", Site.context(layer)] = num_tokens * queries
    assert on_threads(groups_of(source, world_size), sent) == [expected] * world_size
