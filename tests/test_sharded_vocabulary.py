"""Embedding and output head cut by vocabulary, ranks in threads against one rank."""

from collections import Counter

import pytest
import torch
from checkpoints import BY_NAME, EACH_KERNELS, HAS_NATIVE, load, prompt_logits, random_tokens
from thread_group import on_ranks, thread_groups
from torch import Tensor

from headrace.config import Dtype, ParallelConfig, Quantize, WeightFormat
from headrace.costs.sharding import shard_kv_heads, shard_vocabulary, vocabulary_shard_sizes
from headrace.costs.sites import Site
from headrace.kernels import KernelChoice, resolve_kernels
from headrace.layers.context import LayerContext
from headrace.layers.embedding import LmHead, TokenEmbedding
from headrace.layers.parameter import ParameterRows
from headrace.models.decoder import Decoder
from headrace.models.source import ModelSource, open_model
from headrace.parallel.group import OneRankGroup

PROMPT = random_tokens(21, seed=4)
FAMILIES = ["llama", "llama-tied", "opt", "opt-350m", "gemma2", "chatglm3"]


def source_of(folder, name):
    BY_NAME[name].write(folder)
    return open_model(folder)


def logits_on(decoder: Decoder, group, **how) -> Tensor:
    kv_heads = shard_kv_heads(decoder.config.attention.num_kv_heads, group.rank, group.world_size)
    return prompt_logits(decoder, PROMPT, num_kv_heads=len(kv_heads), **how)


def vocabulary_bytes(decoder: Decoder) -> int:
    """Of embedding table and head, counted once."""
    parameters = {id(p): p for p in (decoder.embedding.table, *decoder.lm_head.parameters())}
    return sum(p.num_bytes for p in parameters.values())


@EACH_KERNELS
@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("name", FAMILIES)
def test_summed_embeddings_are_those_of_one_rank(tmp_path, name, world_size, kernels) -> None:
    """To the bit: all ranks but one add zeros."""
    source = source_of(tmp_path, name)
    ids, positions = torch.tensor(PROMPT), torch.arange(len(PROMPT))
    expected = load(source, kernels=kernels).embedding(ids, positions)

    def run(group) -> Tensor:
        decoder = load(source, kernels=kernels, group=group, parallel=ParallelConfig(shard_embedding=True))
        assert (
            decoder.embedding.table.local_rows
            == vocabulary_shard_sizes(source.config.vocab_size, world_size)[group.rank]
        )
        found = decoder.embedding(ids, positions)
        (row,) = group.ledger_rows()
        width = source.config.embedding.projection_size or source.config.hidden_size
        assert (row.operation, row.site, row.count) == ("all_reduce", Site.EMBEDDING, 1)
        assert row.payload_bytes == len(PROMPT) * width * 4
        return found

    for found in on_ranks(thread_groups(world_size), run):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("name", FAMILIES)
def test_literal_variants_give_the_logits_of_one_rank_on_every_rank(tmp_path, name, world_size) -> None:
    source = source_of(tmp_path, name)
    expected = logits_on(load(source), OneRankGroup())

    def run(group) -> Tensor:
        parallel = ParallelConfig(shard_embedding=True, gather_logits=True)
        found = logits_on(load(source, group=group, parallel=parallel), group)
        counts = Counter({row.site: row.count for row in group.ledger_rows()})
        assert counts[Site.EMBEDDING] == counts[Site.LOGITS] == 1
        return found

    found = on_ranks(thread_groups(world_size), run)
    assert (found[0] - expected).abs().max() < 1e-4
    assert all(torch.equal(found[0], other) for other in found)


def test_gathered_logits_travel_in_the_type_of_activations(tmp_path) -> None:
    source = source_of(tmp_path, "llama")
    sizes = vocabulary_shard_sizes(source.config.vocab_size, 2)

    def run(group) -> tuple[Tensor, int]:
        decoder = load(source, dtype=Dtype.BFLOAT16, group=group, parallel=ParallelConfig(gather_logits=True))
        found = logits_on(decoder, group, dtype=torch.bfloat16)
        return found, next(row.payload_bytes for row in group.ledger_rows() if row.site == Site.LOGITS)

    for size, (logits, payload_bytes) in zip(sizes, on_ranks(thread_groups(2), run), strict=True):
        assert payload_bytes == len(PROMPT) * size * 2
        assert logits.dtype == torch.float32
        assert torch.equal(logits, logits.bfloat16().float())


def test_without_literal_variants_neither_embedding_nor_head_exchange(tmp_path) -> None:
    source = source_of(tmp_path, "llama-tied")

    def sites(group) -> set[str]:
        logits_on(load(source, group=group), group)
        return {row.site for row in group.ledger_rows()}

    for found in on_ranks(thread_groups(2), sites):
        assert found == {
            f"layers.{i}.{part}" for i in range(source.config.num_hidden_layers) for part in ("attention", "mlp")
        }


@EACH_KERNELS
@pytest.mark.parametrize("quantize", [Quantize.NONE, Quantize.INT8, Quantize.INT4], ids=lambda q: q.value)
@pytest.mark.parametrize("world_size", [2, 3, 5, 14, 16])
def test_a_tied_head_reads_its_rows_of_the_table(tmp_path, world_size, quantize, kernels) -> None:
    """The same bits as the whole head's, from the same memory; 14 panels leave two of 16 ranks without tokens."""
    source = source_of(tmp_path, "llama-tied")
    chosen = resolve_kernels(kernels)
    whole = load(source, quantize=quantize, kernels=chosen)
    hidden_states = torch.randn(5, source.config.hidden_size, generator=torch.Generator().manual_seed(3))
    expected = whole.lm_head(hidden_states)
    table = whole.embedding.table
    for rank in range(world_size):
        rows = shard_vocabulary(source.config.vocab_size, rank, world_size)
        part = ParameterRows(table, rows, chosen.weight_rows)
        assert part.weight.shape == (len(rows), source.config.hidden_size)
        if rows:
            found = chosen.linear(hidden_states, part.weight, out_dtype=torch.float32)
            torch.testing.assert_close(found, expected[:, rows.start : rows.stop], rtol=1e-5, atol=1e-6)


@EACH_KERNELS
@pytest.mark.parametrize("weight_format", WeightFormat, ids=lambda f: f.value)
def test_rows_share_and_keep_the_memory_of_the_matrix(weight_format, kernels) -> None:
    chosen = resolve_kernels(kernels)
    builder = chosen.make_weight_builder(weight_format, 70, 45)
    values = torch.randn(70, 45, generator=torch.Generator().manual_seed(1))
    builder.write(0, values)
    whole = builder.build()
    expected = chosen.embedding(torch.arange(70), whole, dtype=torch.float32)
    parts = {(a, b): chosen.weight_rows(whole, range(a, b)) for a, b in [(0, 16), (16, 64), (64, 70), (48, 48)]}
    del whole
    for (start, stop), rows in parts.items():
        assert rows.shape == (stop - start, 45)
        ids = torch.arange(stop - start)
        assert torch.equal(chosen.embedding(ids, rows, dtype=torch.float32), expected[start:stop])
    builder.write(0, 2 * values)
    del builder
    found = chosen.embedding(torch.arange(48), parts[16, 64], dtype=torch.float32)
    torch.testing.assert_close(found, 2 * expected[16:64])


@pytest.mark.skipif(not HAS_NATIVE, reason="the native module is not built")
@pytest.mark.parametrize(("start", "stop"), [(8, 32), (0, 33), (-16, 16), (32, 16), (64, 80)])
def test_packed_rows_that_are_no_panels_are_refused(start, stop) -> None:
    chosen = resolve_kernels(KernelChoice.CPU)
    weight = chosen.make_weight_builder(WeightFormat.FLOAT32, 70, 4).build()
    with pytest.raises((ValueError, IndexError), match="rows"):
        chosen.weight_rows(weight, range(start, stop))


@EACH_KERNELS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weight_format", [WeightFormat.FLOAT32, WeightFormat.INT4], ids=lambda f: f.value)
def test_ids_outside_give_zeros_where_asked(weight_format, dtype, kernels) -> None:
    chosen = resolve_kernels(kernels)
    builder = chosen.make_weight_builder(weight_format, 16, 5)
    builder.write(0, torch.ones(16, 5))
    ids = torch.tensor([31, 32, 47, 48, 0, 2**40, 33])
    found = chosen.embedding(ids, builder.build(), dtype=dtype, scale=2.0, offset=-32, zeros_outside=True)
    assert found.dtype == dtype
    assert (found.abs() > 1).tolist() == [[row in (32, 47, 33)] * 5 for row in ids.tolist()]
    assert (found[[0, 3, 4, 5]] == 0).all()


@pytest.mark.parametrize("shard_embedding", [False, True])
@pytest.mark.parametrize("name", ["llama", "llama-tied", "chatglm3"])
def test_each_rank_reads_its_own_rows_of_the_checkpoint(tmp_path, name, shard_embedding) -> None:
    source = source_of(tmp_path, name)
    config = source.config
    table, head = (source.family.locate(f"{n}.weight", config).name for n in ("model.embed_tokens", "lm_head"))
    for group in thread_groups(2):
        read: dict[str, set[int]] = {table: set(), head: set()}

        def read_rows(name: str, start: int, stop: int, read=read, checkpoint=source.checkpoint) -> Tensor:
            read.setdefault(name, set()).update(range(start, stop))
            return type(checkpoint).read_rows(checkpoint, name, start, stop)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(source.checkpoint, "read_rows", read_rows)
            load(source, group=group, parallel=ParallelConfig(shard_embedding=shard_embedding))
        shard = set(shard_vocabulary(config.vocab_size, group.rank, 2))
        assert read[table] == (shard if shard_embedding else set(range(config.vocab_size)))
        assert read[head] == (set() if config.tie_word_embeddings else shard)


@EACH_KERNELS
@pytest.mark.parametrize("name", ["llama", "llama-tied", "opt-350m"])
def test_each_rank_holds_its_share_of_the_vocabulary(tmp_path, name, kernels) -> None:
    """Replicated tables are whole, heads and summed tables are shares, and no matrix exists twice on a rank."""
    source = source_of(tmp_path, name)
    vocab_size, is_tied = source.config.vocab_size, source.config.tie_word_embeddings
    width = source.config.embedding.projection_size or source.config.hidden_size
    num_bytes = resolve_kernels(kernels).weight_num_bytes

    def rows_bytes(rows: int) -> int:
        return num_bytes(WeightFormat.FLOAT32, rows, width)

    for shard_embedding in (False, True):
        for group, size in zip(thread_groups(4), vocabulary_shard_sizes(vocab_size, 4), strict=True):
            decoder = load(
                source, kernels=kernels, group=group, parallel=ParallelConfig(shard_embedding=shard_embedding)
            )
            head_bytes = 0 if is_tied else rows_bytes(size)
            extra = decoder.lm_head.project_out.num_bytes if decoder.lm_head.project_out else 0
            table_bytes = rows_bytes(size if shard_embedding else vocab_size)
            assert vocabulary_bytes(decoder) == table_bytes + head_bytes + extra
            (matrix, *_) = decoder.lm_head.matrices()
            assert matrix.weight.shape == (size, width)


def vocabulary_only(
    source: ModelSource, group, kernels: KernelChoice, parallel: ParallelConfig
) -> tuple[TokenEmbedding, LmHead]:
    """Embedding and head of a rank, whose group need not divide the attention heads."""
    context = LayerContext(kernels=resolve_kernels(kernels), tp_group=group, parallel=parallel)
    embedding = TokenEmbedding(source.config, context, torch.float32)
    head = LmHead(source.config, embedding, context)
    for parameter in (*embedding.parameters(), *head.parameters()):
        (part,) = parameter.slices
        name = source.family.locate(part.name, source.config).name
        builder = context.kernels.make_weight_builder(WeightFormat.FLOAT32, len(part.rows), part.shape[1])
        builder.write(0, source.checkpoint.read_rows(name, part.rows.start, part.rows.stop))
        parameter.set_value(builder.build())
    return embedding, head


@EACH_KERNELS
def test_a_rank_without_tokens_takes_part(tmp_path, kernels) -> None:
    """A vocabulary of 14 panels on 16 ranks, in a group that shares nothing else."""
    source = source_of(tmp_path, "llama")
    expected = load(source, kernels=kernels)
    ids, positions = torch.tensor(PROMPT), torch.arange(len(PROMPT))
    hidden_states = torch.randn(3, source.config.hidden_size, generator=torch.Generator().manual_seed(5))
    sizes = vocabulary_shard_sizes(source.config.vocab_size, 16)
    assert sizes[-2:] == [0, 0]

    def run(group) -> tuple[Tensor, Tensor, Tensor]:
        shard = vocabulary_only(source, group, kernels, ParallelConfig(shard_embedding=True))
        gathering = vocabulary_only(source, group, kernels, ParallelConfig(gather_logits=True))
        assert [matrix.local_rows for matrix in shard[1].matrices()] == [size for size in [sizes[group.rank]] if size]
        return shard[0](ids, positions), shard[1](hidden_states), gathering[1](hidden_states)

    found = on_ranks(thread_groups(16), run)
    assert [logits.shape[1] for _, logits, _ in found] == sizes
    assert (torch.cat([logits for _, logits, _ in found], dim=1) - expected.lm_head(hidden_states)).abs().max() < 1e-5
    for embedded, _, gathered in found:
        assert torch.equal(embedded, expected.embedding(ids, positions))
        assert torch.equal(gathered, found[0][2])
    assert (found[0][2] - expected.lm_head(hidden_states)).abs().max() < 1e-5
