"""How a model is cut among ranks: pure shares as partitions, and ranks in threads against one rank."""

import pytest
import torch
from checkpoints import BY_NAME, load, prompt_logits, random_tokens
from hypothesis import given
from hypothesis import strategies as st
from thread_group import on_ranks, thread_groups
from torch import Tensor

from headrace.config import Quantize
from headrace.costs.sharding import (
    check_heads_divide,
    shard_kv_heads,
    shard_range,
    shard_vocabulary,
    vocabulary_shard_sizes,
)
from headrace.errors import ParallelismError
from headrace.kernels import KernelChoice
from headrace.models.source import open_model
from headrace.parallel.group import OneRankGroup

# Shares


@given(num_units=st.integers(0, 500), world_size=st.integers(1, 64))
def test_shard_ranges_are_a_partition_in_rank_order_and_even(num_units, world_size):
    ranges = [shard_range(num_units, rank, world_size) for rank in range(world_size)]
    assert [unit for part in ranges for unit in part] == list(range(num_units))
    sizes = [len(part) for part in ranges]
    assert max(sizes) - min(sizes) <= 1
    assert sizes == sorted(sizes, reverse=True)


@given(vocab_size=st.integers(1, 3000), world_size=st.integers(1, 64))
def test_vocabulary_shards_are_a_partition_of_whole_panels_the_largest_first(vocab_size, world_size):
    shards = [shard_vocabulary(vocab_size, rank, world_size) for rank in range(world_size)]
    assert [token_id for shard in shards for token_id in shard] == list(range(vocab_size))
    assert all(
        shard.start % 16 == 0 and (shard.stop % 16 == 0 or shard.stop == vocab_size) for shard in shards if shard
    )
    sizes = [len(shard) for shard in shards]
    assert sizes == sorted(sizes, reverse=True)
    # A panel more than the smallest, and what the last panel lacks.
    assert max(sizes) - min(sizes) < 32
    assert max(sizes) <= -(-vocab_size // world_size) + 15


@given(num_kv_heads=st.integers(1, 64), group=st.integers(1, 16), data=st.data())
def test_each_rank_holds_the_kv_heads_of_its_query_heads(num_kv_heads, group, data):
    """For every size that works: KV heads are split or repeated evenly, and a rank's query heads find theirs on it, in
    the order that the attention op assumes."""
    num_heads = num_kv_heads * group
    sizes = [n for n in range(1, num_heads + 1) if divides(num_heads, num_kv_heads, n)]
    world_size = data.draw(st.sampled_from(sizes))
    holders = [0] * num_kv_heads
    for rank in range(world_size):
        heads = shard_range(num_heads, rank, world_size)
        kv_heads = shard_kv_heads(num_kv_heads, rank, world_size)
        shared_by = len(heads) // len(kv_heads)
        assert [head // group for head in heads] == [kv_heads[i // shared_by] for i in range(len(heads))]
        for head in kv_heads:
            holders[head] += 1
    assert set(holders) == {max(1, world_size // num_kv_heads)}


def divides(num_heads: int, num_kv_heads: int, world_size: int) -> bool:
    return num_heads % world_size == 0 and (num_kv_heads % world_size == 0 or world_size % num_kv_heads == 0)


@given(num_kv_heads=st.integers(1, 32), group=st.integers(1, 8), world_size=st.integers(1, 300))
def test_sizes_that_do_not_divide_the_heads_are_refused(num_kv_heads, group, world_size):
    num_heads = num_kv_heads * group
    if divides(num_heads, num_kv_heads, world_size):
        check_heads_divide(num_heads, num_kv_heads, world_size)
    else:
        with pytest.raises(ParallelismError):
            check_heads_divide(num_heads, num_kv_heads, world_size)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "size", "working"),
    [(12, 4, 5, "1, 2, 4, 12"), (32, 8, 3, "1, 2, 4, 8, 16, 32"), (12, 2, 8, "1, 2, 4, 6, 12"), (1, 1, 2, "1")],
)
def test_refusal_names_the_sizes_that_work(heads, kv_heads, size, working):
    with pytest.raises(ParallelismError, match=f"tensor_parallel_size {size} .* sizes that work: {working}$"):
        check_heads_divide(heads, kv_heads, size)


def test_one_rank_exchanges_nothing():
    group, tensor = OneRankGroup(), torch.arange(6.0).view(2, 3)
    assert torch.equal(group.all_reduce(tensor, "here"), torch.arange(6.0).view(2, 3))
    assert torch.equal(*group.all_gather(tensor, "here"), torch.arange(6.0).view(2, 3))
    assert torch.equal(group.reduce_scatter(tensor[None], "here"), torch.arange(6.0).view(2, 3))


# Ranks in threads

PROMPT = random_tokens(30, seed=9)

LAYOUTS = [
    ("llama", 2),
    ("llama", 4),
    ("llama-biases", 2),
    ("llama-gqa", 2),
    ("llama-gqa", 4),  # two ranks to each KV head
    ("llama-one-kv-head", 4),
    ("llama-tied", 2),
    ("llama-tied", 4),
    ("qwen3", 4),
    ("opt", 2),
    ("opt", 4),
    ("opt-350m", 4),
    ("chatglm3", 2),
    ("chatglm3", 4),
    ("chatglm-biases-layer-norm", 4),
    ("glm", 4),
    ("gemma2", 4),
    ("mixtral", 2),
    ("qwen3-moe", 4),
]


def logits_of_rank(source, group, **how) -> Tensor:
    decoder = load(source, group=group, **how)
    kv_heads = shard_kv_heads(source.config.attention.num_kv_heads, group.rank, group.world_size)
    return prompt_logits(decoder, PROMPT, num_kv_heads=len(kv_heads))


def logits_of_ranks(source, world_size: int, **how) -> list[Tensor]:
    return on_ranks(thread_groups(world_size), lambda group: logits_of_rank(source, group, **how))


@pytest.mark.parametrize(("name", "world_size"), LAYOUTS, ids=[f"{name}-{size}" for name, size in LAYOUTS])
def test_ranks_together_give_the_logits_of_one_rank(tmp_path, name, world_size):
    BY_NAME[name].write(tmp_path)
    source = open_model(tmp_path)
    expected = logits_of_rank(source, OneRankGroup())
    shards = logits_of_ranks(source, world_size)
    assert [shard.shape[1] for shard in shards] == vocabulary_shard_sizes(source.config.vocab_size, world_size)
    assert (torch.cat(shards, dim=1) - expected).abs().max() < 1e-4


@pytest.mark.parametrize("quantize", [Quantize.INT8, Quantize.INT4], ids=lambda q: q.value)
@pytest.mark.parametrize("name", ["llama-gqa", "llama-tied", "chatglm3", "opt"])
def test_ranks_quantize_their_own_shares(tmp_path, name, quantize):
    """A rank's columns may begin within a group of the whole matrix, so its scales are its own: near, not equal."""
    BY_NAME[name].write(tmp_path)
    source = open_model(tmp_path)
    expected = logits_of_rank(source, OneRankGroup())
    alone = (logits_of_rank(source, OneRankGroup(), quantize=quantize) - expected).abs().mean()
    actual = torch.cat(logits_of_ranks(source, 2, quantize=quantize), dim=1)
    assert (actual - expected).abs().mean() < 1.5 * alone


@pytest.mark.parametrize(("name", "world_size"), LAYOUTS, ids=[f"{name}-{size}" for name, size in LAYOUTS])
def test_ranks_share_the_weights(tmp_path, name, world_size):
    """Each rank holds its share of what is sharded, and no rank the whole model.

    Counted with the reference's weights, which have no padding.
    """
    BY_NAME[name].write(tmp_path)
    source = open_model(tmp_path)

    def sharded_bytes(group) -> int:
        decoder = load(source, group=group, kernels=KernelChoice.REFERENCE)
        linears = [p for layer in decoder.layers for p in layer.parameters() if p.is_matrix and p.is_quantizable]
        return sum(parameter.num_bytes for parameter in linears)

    whole = sharded_bytes(OneRankGroup())
    shares = [sharded_bytes(group) for group in thread_groups(world_size)]
    repeated = max(1.0, world_size / source.config.attention.num_kv_heads)
    assert whole <= sum(shares) <= whole * repeated
    # Features are dealt out in whole groups: gate, up and down projections may differ by one.
    group_bytes = 3 * 32 * source.config.hidden_size * 4 * source.config.num_hidden_layers * num_experts(source.config)
    assert max(shares) - min(shares) <= group_bytes


def num_experts(config) -> int:
    return max(1 if layer.moe is None else layer.moe.num_experts for layer in config.layers)


def test_size_that_does_not_divide_the_model_is_refused(tmp_path):
    BY_NAME["llama"].write(tmp_path)
    with pytest.raises(ParallelismError, match="tensor_parallel_size 3 does not divide 4 attention heads"):
        load(open_model(tmp_path), group=thread_groups(3)[0])
