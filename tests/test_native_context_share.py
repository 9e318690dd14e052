"""Queries put together and shares weighted, natively and by the reference, against float64."""

import math

import pytest
import torch
from torch import Tensor

from headrace.config import KvCacheFormat
from headrace.errors import KernelError, ShapeError
from headrace.kernels import NOT_STORED, AttentionShare, KvCacheSpec, reference

cpu = pytest.importorskip("headrace.kernels.cpu", reason="the native module is not built", exc_type=ImportError)

TARGETS = cpu.supported_targets()
each_ops = pytest.mark.parametrize("ops", ["reference", *TARGETS])
BOTH = [torch.float32, torch.bfloat16]


def ops_of(name: str):
    return reference if name == "reference" else cpu.ContextShare(name, cpu.Stream())


def random_shares(num_ranks: int, num_tokens: int, num_heads: int, head_dim: int) -> list[AttentionShare]:
    """References far apart, so that some ranks weigh nothing; one rank sees nothing of half the tokens."""
    generator = torch.Generator().manual_seed(num_ranks)
    shares = []
    for _ in range(num_ranks):
        denominators = torch.rand(num_tokens, num_heads, generator=generator) * 100 + 0.5
        references = torch.randn(num_tokens, num_heads, generator=generator) * 40
        numerators = torch.randn(num_tokens, num_heads, head_dim, generator=generator)
        shares.append(AttentionShare(numerators, torch.stack([denominators, references], dim=2)))
    shares[0].numerators[::2] = 0
    shares[0].normalizers[::2] = torch.tensor([0.0, -math.inf])
    return shares


def exact(shares: list[AttentionShare], rank: int) -> Tensor:
    denominators, references = torch.stack([share.normalizers for share in shares]).double().unbind(-1)
    weights = torch.exp2(references - references.amax(0))
    return shares[rank].numerators.double() * (weights[rank] / (weights * denominators).sum(0))[..., None]


class TestWeighShare:
    @each_ops
    @pytest.mark.parametrize("dtype", BOTH, ids=str)
    @pytest.mark.parametrize(("num_tokens", "num_heads", "head_dim"), [(1, 4, 8), (3, 6, 24), (70, 2, 128)])
    def test_each_rank_adds_its_part(self, ops, dtype, num_tokens, num_heads, head_dim):
        shares = random_shares(3, num_tokens, num_heads, head_dim)
        for rank, share in enumerate(shares):
            part = ops_of(ops).weigh_share(share, [s.normalizers for s in shares], rank, dtype=dtype)
            assert part.dtype == dtype
            assert part.shape == (1, num_tokens, num_heads, head_dim)
            tolerance = 1e-5 if dtype == torch.float32 else 2.0**-8
            assert torch.allclose(part[0].double(), exact(shares, rank), rtol=tolerance, atol=1e-7)

    @each_ops
    @pytest.mark.parametrize("dtype", BOTH, ids=str)
    def test_heads_are_dealt_out_in_parts(self, ops, dtype):
        shares = random_shares(2, 5, 6, 16)
        normalizers = [s.normalizers for s in shares]
        whole = ops_of(ops).weigh_share(shares[1], normalizers, 1, dtype=dtype)[0]
        parts = ops_of(ops).weigh_share(shares[1], normalizers, 1, dtype=dtype, num_parts=3)
        assert parts.is_contiguous()
        assert torch.equal(parts, torch.stack(whole.split(2, dim=1)))

    @each_ops
    def test_a_rank_with_nothing_adds_zeros_and_takes_no_weight(self, ops):
        full = AttentionShare(torch.full((1, 1, 3), 6.0), torch.tensor([[[2.0, 5.0]]]))
        nothing = AttentionShare(torch.zeros(1, 1, 3), torch.tensor([[[0.0, -math.inf]]]))
        normalizers = [nothing.normalizers, full.normalizers]
        weigh = ops_of(ops).weigh_share
        assert weigh(nothing, normalizers, 0, dtype=torch.float32).flatten().tolist() == [0, 0, 0]
        assert weigh(full, normalizers, 1, dtype=torch.float32).flatten().tolist() == [3, 3, 3]

    @each_ops
    def test_what_is_no_number_anywhere_is_one_nowhere(self, ops):
        """Infinite or missing logits on one rank must show up in the sum over ranks."""
        fine = AttentionShare(torch.ones(1, 1, 2), torch.tensor([[[1.0, 0.0]]]))
        nan, infinite = torch.tensor([[[math.nan, math.nan]]]), torch.tensor([[[math.nan, math.inf]]])
        empty = torch.tensor([[[0.0, -math.inf]]])
        for normalizers in ([fine.normalizers, nan], [fine.normalizers, infinite]):
            assert ops_of(ops).weigh_share(fine, normalizers, 0, dtype=torch.float32).isnan().all()
        nothing = AttentionShare(torch.zeros(1, 1, 2), empty)
        assert ops_of(ops).weigh_share(nothing, [empty, empty], 0, dtype=torch.float32).isnan().all()

    @pytest.mark.parametrize("target", TARGETS)
    def test_bad_shapes_are_refused(self, target):
        shares = random_shares(2, 3, 4, 8)
        ops, normalizers = ops_of(target), [s.normalizers for s in shares]
        with pytest.raises(ShapeError, match="divided by the parts"):
            ops.weigh_share(shares[0], normalizers, 0, dtype=torch.float32, num_parts=3)
        with pytest.raises(ShapeError):
            ops.weigh_share(shares[0], [normalizers[0], normalizers[1][:2]], 0, dtype=torch.float32)
        with pytest.raises(KernelError, match="float32"):
            ops.weigh_share(shares[0], [x.double() for x in normalizers], 0, dtype=torch.float32)
        with pytest.raises(ValueError, match="rank"):
            ops.weigh_share(shares[0], normalizers, 2, dtype=torch.float32)


class TestJoinHeads:
    @each_ops
    @pytest.mark.parametrize("dtype", BOTH, ids=str)
    def test_parts_lie_side_by_side(self, ops, dtype):
        parts = [torch.randn(5, 3, 8).to(dtype) for _ in range(3)]
        joined = ops_of(ops).join_heads(parts)
        assert joined.shape == (5, 9, 8)
        assert all(torch.equal(joined[:, 3 * i : 3 * i + 3], part) for i, part in enumerate(parts))

    @each_ops
    def test_parts_may_lie_within_something_wider(self, ops):
        """As the query heads do within the output of a fused projection."""
        wide = torch.randn(4, 7, 8)
        joined = ops_of(ops).join_heads([wide[:, 1:3], wide[:, 4:6]])
        assert torch.equal(joined, wide[:, [1, 2, 4, 5]])
        assert joined.is_contiguous()

    @pytest.mark.parametrize("target", TARGETS)
    def test_parts_of_different_shapes_are_refused(self, target):
        with pytest.raises(ShapeError):
            ops_of(target).join_heads([torch.zeros(2, 1, 4), torch.zeros(2, 2, 4)])


class TestTokensThatAnotherRankKeeps:
    @pytest.mark.parametrize("cache_format", list(KvCacheFormat), ids=lambda f: f.value)
    @each_ops
    def test_they_are_not_written_and_their_queries_are_rotated(self, ops, cache_format):
        spec = KvCacheSpec(cache_format=cache_format, num_blocks=1, block_size=4, num_kv_heads=1, head_dim=8)
        implementation = reference if ops == "reference" else cpu
        store = reference.rotary_store_kv_ if ops == "reference" else cpu.RotaryStoreKv(ops, cpu.Stream())
        cache = implementation.make_kv_cache(spec)
        before, after = torch.ones(4, 1, 8), torch.full((4, 1, 8), 2.0)
        store(before[:, :0], before, before, cache, torch.arange(4), None)
        query = torch.ones(4, 2, 8)
        angles = torch.full((4, 4), math.cos(1.0)), torch.full((4, 4), math.sin(1.0))
        slots = torch.tensor([NOT_STORED, 3, NOT_STORED, 1])
        store(query, after.clone(), after, cache, slots, angles)
        assert implementation.read_kv(cache, torch.arange(4))[1][:, 0, 0].round().tolist() == [1, 2, 1, 2]
        assert (query[0] == query[1]).all()
        assert not (query == 1).any()

    @pytest.mark.parametrize("target", TARGETS)
    def test_a_slot_below_zero_is_still_refused(self, target):
        """-1 is the last place of block -1, which is no block."""
        spec = KvCacheSpec(cache_format=KvCacheFormat.FLOAT32, num_blocks=1, block_size=4, num_kv_heads=1, head_dim=8)
        x = torch.ones(1, 1, 8)
        with pytest.raises(IndexError, match="slot -1"):
            cpu.RotaryStoreKv(target, cpu.Stream())(x[:, :0], x, x, cpu.make_kv_cache(spec), torch.tensor([-1]), None)
