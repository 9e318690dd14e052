"""Attention over shares of contexts against float64, on every instruction set, cache format and softmax scheme."""

import math
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from headrace.config import KvCacheFormat, SoftmaxScheme
from headrace.errors import ShapeError
from headrace.kernels import AttentionShare, AttentionSpec, KvCache, reference
from headrace.kernels.kv_cache import KvCacheSpec

native = pytest.importorskip("test_native_attention", reason="the native module is not built", exc_type=ImportError)
cpu, _native = native.cpu, native._native
each_target, each_format, each_scheme = native.each_target, native.each_format, native.each_scheme
make_problem, make_spec, store = native.make_problem, native.make_spec, native.store

TARGETS = cpu.supported_targets()
EVERYTHING = [(1, 1), (2, 1), (15, 3), (16, 16), (17, 1), (31, 31), (255, 1), (256, 7), (257, 2), (701, 1)]


@pytest.fixture(autouse=True)
def _two_threads():
    before = _native.num_threads()
    _native.set_num_threads(2)
    yield
    _native.set_num_threads(before)


@dataclass(frozen=True, kw_only=True)
class Share:
    """What one rank holds of a problem: its blocks, in a cache of their own and another order."""

    cache: KvCache
    tables: Tensor
    owned_blocks: Tensor
    owners: list[list[int]]
    rank: int


def cut(problem, num_ranks: int, *, seed: int = 0, make_cache=cpu.make_kv_cache, keep=store) -> list[Share]:
    """Gives each block of each sequence to a rank drawn at random."""
    generator = torch.Generator().manual_seed(seed)
    size = problem.cache.spec.block_size
    owners = [
        torch.randint(0, num_ranks, (-(-length // size),), generator=generator).tolist()
        for length in problem.context_lens
    ]
    return [_share(problem, owners, rank, make_cache, keep) for rank in range(num_ranks)]


def _share(problem, owners: list[list[int]], rank: int, make_cache, keep) -> Share:
    spec, width = problem.cache.spec, problem.tables.shape[1]
    num_owned = sum(row.count(rank) for row in owners)
    cache = make_cache(KvCacheSpec(**vars(spec) | {"num_blocks": num_owned + 1}))
    ids = iter(torch.randperm(num_owned + 1, generator=torch.Generator().manual_seed(rank)).tolist())
    tables = torch.full((len(owners), width), -1, dtype=torch.int32)
    owned_blocks = torch.zeros(len(owners), width + 1, dtype=torch.int32)
    for seq, row in enumerate(owners):
        mine = torch.tensor([owner == rank for owner in row] + [False] * (width - len(row)))
        owned_blocks[seq, 1:] = mine.cumsum(0)
        slots = problem.slots(seq)
        for local, block in enumerate(mine.nonzero().flatten().tolist()):
            tables[seq, local] = new_id = next(ids)
            old = slots[block * spec.block_size : (block + 1) * spec.block_size]
            key, value = (x.to(problem.query.dtype) for x in cpu.read_kv(problem.cache, old))
            keep(cache, key, value, new_id * spec.block_size + torch.arange(len(old)))
    return Share(cache=cache, tables=tables, owned_blocks=owned_blocks, owners=owners, rank=rank)


def arguments(problem, share: Share) -> tuple[Tensor, KvCache, Tensor, Tensor, Tensor, Tensor]:
    lens = torch.tensor(problem.context_lens, dtype=torch.int32)
    bounds = torch.tensor(problem.bounds, dtype=torch.int32)
    return problem.query, share.cache, share.tables, lens, bounds, share.owned_blocks


def run(target: str, problem, share: Share, spec: AttentionSpec, *, max_pieces: int | None = None) -> AttentionShare:
    return cpu.Attention(target, cpu.Stream()).share(*arguments(problem, share), spec, max_pieces=max_pieces)


def exact_logits(problem, spec: AttentionSpec, row: int, seq: int) -> tuple[Tensor, Tensor]:
    """Natural logits [num_heads, seen], and the positions seen, in float64."""
    context, ratio = problem.context_lens[seq], problem.query.shape[1] // problem.cache.spec.num_kv_heads
    stop = context - (problem.bounds[seq + 1] - row) + 1
    start = 0 if spec.sliding_window is None else max(0, stop - spec.sliding_window)
    keys = cpu.read_kv(problem.cache, problem.slots(seq))[0].double().repeat_interleave(ratio, dim=1)[start:stop]
    logits = torch.einsum("hd,phd->hp", native.seen_queries(problem)[row], keys) * spec.softmax_scale
    if spec.logit_soft_cap is not None:
        logits = spec.logit_soft_cap * torch.tanh(logits / spec.logit_soft_cap)
    return logits, torch.arange(start, stop)


def assert_share_right(actual: AttentionShare, problem, share: Share, spec: AttentionSpec) -> None:
    """log of the denominator and the quotient are those of the owned positions alone; nothing where there are none."""
    size, ratio = problem.cache.spec.block_size, problem.query.shape[1] // problem.cache.spec.num_kv_heads
    tolerance = native.TOLERANCE[problem.cache.spec.cache_format]
    assert actual.numerators.shape == problem.query.shape
    for seq in range(len(problem.context_lens)):
        values = cpu.read_kv(problem.cache, problem.slots(seq))[1].double().repeat_interleave(ratio, dim=1)
        for row in range(problem.bounds[seq], problem.bounds[seq + 1]):
            logits, positions = exact_logits(problem, spec, row, seq)
            mine = torch.tensor([share.owners[seq][p // size] == share.rank for p in positions.tolist()])
            numerators, (denominators, references) = actual.numerators[row], actual.normalizers[row].T
            if not mine.any():
                assert not numerators.any()
                assert not denominators.any()
                assert (references == -math.inf).all()
                continue
            lse = references.double() * math.log(2) + denominators.double().log()
            expected = torch.logsumexp(logits[:, mine], dim=1)
            assert ((lse - expected).abs() <= max(tolerance, 1e-6 * float(expected.abs().max()))).all()
            out = torch.einsum("hp,phd->hd", torch.softmax(logits[:, mine], dim=1), values[positions[mine]])
            largest = max(1.0, float(out.abs().max()))
            assert (numerators.double() / denominators.double()[:, None] - out).abs().max() <= tolerance * largest


def joined(shares: list[AttentionShare]) -> Tensor:
    """The definition of a sum of shares, in float64."""
    denominators, references = torch.stack([share.normalizers for share in shares]).double().unbind(-1)
    weights = torch.exp2(references - references.amax(0))
    total = (weights * denominators).sum(0)[..., None]
    return sum(w[..., None] * s.numerators.double() for w, s in zip(weights, shares, strict=True)) / total


class TestShares:
    @each_target
    @each_format
    @each_scheme
    def test_a_share_is_attention_over_its_blocks(self, target, cache_format, scheme):
        problem = make_problem(cache_format, lens=tuple(EVERYTHING))
        for share in cut(problem, 3):
            assert_share_right(run(target, problem, share, make_spec(scheme)), problem, share, make_spec(scheme))

    @each_target
    @each_format
    @each_scheme
    @pytest.mark.parametrize("settings", [{}, {"sliding_window": 21}, {"logit_soft_cap": 3.0}], ids=str)
    def test_shares_add_up_to_the_whole(self, target, cache_format, scheme, settings):
        problem, spec = make_problem(cache_format, lens=((300, 90), (33, 1))), make_spec(scheme, **settings)
        together = joined([run(target, problem, share, spec) for share in cut(problem, 4)])
        native.assert_right(together, problem, spec)

    @each_target
    @pytest.mark.parametrize(("block_size", "head_dim"), [(1, 8), (5, 24), (24, 80), (64, 128)])
    def test_blocks_and_heads_of_any_size(self, target, block_size, head_dim):
        problem = make_problem(
            KvCacheFormat.FLOAT32, lens=((150, 80), (9, 2)), block_size=block_size, head_dim=head_dim
        )
        for settings in ({}, {"sliding_window": block_size + 3}):
            spec = make_spec(head_dim=head_dim, **settings)
            for share in cut(problem, 3):
                assert_share_right(run(target, problem, share, spec), problem, share, spec)

    @each_target
    @each_format
    def test_a_window_may_leave_a_share_and_come_back(self, target, cache_format):
        """Rows that see nothing then lie between rows that do."""
        problem = make_problem(cache_format, lens=((160, 160),))
        spec, owners = make_spec(sliding_window=5), [[0, 1, 1, 0, 1, 0, 0, 1, 1, 0]]
        for rank in range(2):
            share = _share(problem, owners, rank, cpu.make_kv_cache, store)
            assert_share_right(run(target, problem, share, spec), problem, share, spec)

    @each_target
    @each_scheme
    def test_bits_depend_on_neither_pieces_nor_threads_nor_chunks(self, target, scheme):
        problem, spec = make_problem(KvCacheFormat.FLOAT32, lens=((900, 40),)), make_spec(scheme)
        for share in cut(problem, 2):
            whole = run(target, problem, share, spec)
            for max_pieces in (1, 2, 7):
                again = run(target, problem, share, spec, max_pieces=max_pieces)
                assert all(map(torch.equal, whole, again))
            _native.set_num_threads(1)
            assert all(map(torch.equal, whole, run(target, problem, share, spec)))
            _native.set_num_threads(2)
            last = run(target, replace(problem, query=problem.query[-1:], new_lens=[1]), share, spec)
            assert all(torch.equal(a[-1:], b) for a, b in zip(whole, last, strict=True))

    @each_target
    def test_reference_defines_it(self, target):
        problem = make_problem(KvCacheFormat.FLOAT32, lens=((70, 30), (5, 5), (40, 1)))

        def keep(cache, key, value, slots):
            reference.rotary_store_kv_(key[:, :0], key, value, cache, slots, None)

        for settings in ({}, {"sliding_window": 9}, {"logit_soft_cap": 2.0}):
            spec = make_spec(**settings)
            defined = cut(problem, 3, make_cache=reference.make_kv_cache, keep=keep)
            for share, mine in zip(defined, cut(problem, 3), strict=True):
                expected = reference.attention_share(*arguments(problem, share), spec)
                assert_share_right(expected, problem, share, spec)
                for a, b in zip(run(target, problem, mine, spec), expected, strict=True):
                    assert torch.equal(a.isinf(), b.isinf())
                    assert torch.allclose(a, b, rtol=1e-5, atol=1e-5)


class TestUnifiedMax:
    @each_target
    @each_format
    def test_sound_shares_refer_to_it(self, target, cache_format):
        problem = make_problem(cache_format, lens=((200, 3),))
        spec = make_spec(SoftmaxScheme.ASYNCHRONIZED, softmax={"unified_max": 2.5})
        for share in cut(problem, 2):
            references = run(target, problem, share, spec).normalizers[..., 1]
            assert (references == torch.tensor(2.5 * math.log2(math.e))).all()
            assert share.cache.softmax_counts().num_recomputed_rows == 0

    @each_target
    @each_format
    @pytest.mark.parametrize("unified_max", [-1000.0, -90.0, 75.0, 90.0, 1000.0])
    def test_rows_out_of_range_are_computed_again_and_counted(self, target, cache_format, unified_max):
        problem = make_problem(cache_format, lens=((200, 3), (20, 1)))
        spec = make_spec(SoftmaxScheme.ASYNCHRONIZED, softmax={"unified_max": unified_max})
        shares = cut(problem, 2)
        partial = [run(target, problem, share, spec) for share in shares]
        for share, result in zip(shares, partial, strict=True):
            assert_share_right(result, problem, share, spec)
            assert share.cache.softmax_counts().num_recomputed_rows > 0
        native.assert_right(joined(partial), problem, spec)

    @each_target
    def test_a_rank_that_recomputes_and_one_that_does_not_add_up(self, target):
        """Shares of one row then refer to different maxima."""
        problem = make_problem(KvCacheFormat.FLOAT32, lens=((64, 1),))
        owners = [[0, 0, 1, 1]]
        slots = problem.slots(0)
        keys, values = cpu.read_kv(problem.cache, slots)
        keys[40] = 12 * problem.query[0].view(2, 4, 64).mean(1)
        store(problem.cache, keys, values, slots)
        spec = make_spec(SoftmaxScheme.ASYNCHRONIZED, softmax={"unified_max": -86.0})
        shares = [_share(problem, owners, rank, cpu.make_kv_cache, store) for rank in range(2)]
        partial = [run(target, problem, share, spec) for share in shares]
        assert len(torch.stack([p.normalizers[..., 1] for p in partial]).unique()) > 1
        native.assert_right(joined(partial), problem, spec)

    @each_target
    def test_sums_of_many_shares_stay_in_range(self, target):
        """A share whose sum is sound alone but not with others counts as out of range."""
        problem = make_problem(KvCacheFormat.FLOAT32, lens=((64, 1),), query_scale=1e-3)
        (share,) = cut(problem, 1)
        for unified_max, is_again in ((-70.0, False), (-80.0, True)):
            before = share.cache.softmax_counts().num_recomputed_rows
            spec = make_spec(SoftmaxScheme.ASYNCHRONIZED, softmax={"unified_max": unified_max})
            largest = run(target, problem, share, spec).normalizers[..., 0].max()
            assert largest <= 2.0**110
            assert (share.cache.softmax_counts().num_recomputed_rows > before) == is_again


class TestBadInput:
    def problem(self):
        problem = make_problem(KvCacheFormat.FLOAT32, lens=((40, 2),))
        return problem, cut(problem, 2)[0]

    @pytest.mark.parametrize("counts", [[1, 1, 1, 1], [0, 2, 2, 2], [0, 1, 0, 1], [0, 1, 1]], ids=str)
    def test_counts_that_count_nothing(self, counts):
        problem, share = self.problem()
        bad = replace(share, owned_blocks=torch.tensor([counts], dtype=torch.int32))
        with pytest.raises(IndexError, match="context of 3 blocks"):
            run(TARGETS[-1], problem, bad, make_spec())

    def test_more_blocks_than_the_table_has(self):
        problem, share = self.problem()
        bad = replace(share, owned_blocks=torch.tensor([[0, 1, 2, 3]], dtype=torch.int32), tables=share.tables[:, :2])
        with pytest.raises(IndexError, match="room for 32"):
            run(TARGETS[-1], problem, bad, make_spec())

    def test_block_outside_the_cache(self):
        problem, share = self.problem()
        bad = replace(share, tables=share.tables + 100, owned_blocks=torch.tensor([[0, 1, 2, 3]], dtype=torch.int32))
        with pytest.raises(IndexError, match="of a cache with"):
            run(TARGETS[-1], problem, bad, make_spec())

    def test_counts_of_another_batch(self):
        problem, share = self.problem()
        with pytest.raises(ShapeError, match="owned_blocks"):
            run(TARGETS[-1], problem, replace(share, owned_blocks=share.owned_blocks.repeat(2, 1)), make_spec())
