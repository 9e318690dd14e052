"""Triton's rotation, its write to the cache, where splits lie, and the weights of shares, against the reference."""

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

import triton
import triton.language as tl
from triton_device import DEVICE

from headrace.config import KvCacheFormat
from headrace.errors import KernelError, ShapeError
from headrace.kernels import NOT_STORED, AttentionShare, KvCacheSpec, reference
from headrace.kernels.triton import kv_cache as gpu
from headrace.kernels.triton.context_share import weigh_share
from headrace.kernels.triton.rotary import rotary_table
from headrace.kernels.triton.rotary_store import rotary_store_kv_
from headrace.kernels.triton.splits import max_num_splits, split_begin, split_of

pytestmark = [
    pytest.mark.usefixtures("poisoned_memory"),
    pytest.mark.filterwarnings("ignore:(overflow|invalid value|All-NaN):RuntimeWarning"),
]

each_format = pytest.mark.parametrize("cache_format", list(KvCacheFormat), ids=lambda f: f.value)
BFLOAT16_STEP = 2.0**-7
"""Of a value's size: the interpreter cuts bfloat16 off where a GPU rounds it."""


def make_caches(cache_format: KvCacheFormat, head_dim: int, num_kv_heads: int = 3, block_size: int = 8):
    spec = KvCacheSpec(
        cache_format=cache_format, num_blocks=5, block_size=block_size, num_kv_heads=num_kv_heads, head_dim=head_dim
    )
    return gpu.make_kv_cache(spec, device=DEVICE), reference.make_kv_cache(spec)


def store_both(caches, heads, slots, cos_sin, num_kv_heads: int, *, interleaved: bool = False):
    """Each from its own copy of the fused projection's output, whose queries come back."""
    queries = []
    for cache, store, device in zip(
        caches, (rotary_store_kv_, reference.rotary_store_kv_), (DEVICE, "cpu"), strict=True
    ):
        copy = heads.clone().to(device)
        query, key, value = copy.split([copy.shape[1] - 2 * num_kv_heads, num_kv_heads, num_kv_heads], dim=1)
        on_device = None if cos_sin is None else tuple(x.to(device) for x in cos_sin)
        store(query, key, value, cache, slots.to(device), on_device, interleaved=interleaved)
        queries.append(query.float().cpu())
    return queries


class TestRotaryStore:
    @each_format
    @pytest.mark.parametrize(
        ("head_dim", "half", "interleaved"), [(80, 40, False), (80, 20, True), (128, 0, False), (64, 32, True)]
    )
    def test_queries_keys_and_values(self, cache_format, head_dim, half, interleaved):
        caches = make_caches(cache_format, head_dim)
        dtype = torch.float32 if cache_format is KvCacheFormat.FLOAT32 else torch.bfloat16
        heads = torch.randn(6, 15, head_dim).to(dtype)
        slots = torch.randperm(40)[:6]
        positions, inv_freq = torch.randint(0, 5000, (6,)), torch.rand(half)
        cos_sin = reference.rotary_table(positions, inv_freq, 1.25) if half else None
        actual, expected = store_both(caches, heads, slots, cos_sin, 3, interleaved=interleaved)
        tolerance = 1e-6 if dtype is torch.float32 else BFLOAT16_STEP
        assert torch.allclose(actual, expected, rtol=tolerance, atol=tolerance)
        if half == 0:
            assert torch.equal(actual, heads[:, :9].float())
        of_gpu, of_reference = gpu.read_kv(caches[0], slots.to(DEVICE)), reference.read_kv(caches[1], slots)
        for mine, theirs in zip(of_gpu, of_reference, strict=True):
            assert torch.allclose(mine.cpu(), theirs, rtol=tolerance, atol=tolerance)

    @each_format
    def test_a_slot_of_another_rank_is_not_written(self, cache_format):
        caches = make_caches(cache_format, 64)
        caches[0].data.fill_(7)
        slots = torch.tensor([3, NOT_STORED, 39])
        store_both(caches, torch.randn(3, 7, 64), slots, None, 3)
        block, offset = torch.tensor([0, 4]), torch.tensor([3, 7])
        expected = torch.zeros(5, 3, 8, dtype=torch.bool)
        expected[block, :, offset] = True
        written = (caches[0].data != 7).any(-1).any(0).cpu()
        assert torch.equal(written, expected)

    @each_format
    @pytest.mark.parametrize("bad", [torch.nan, torch.inf])
    @pytest.mark.parametrize("is_key", [True, False], ids=["key", "value"])
    def test_a_bad_token_is_marked_by_its_key_and_leaves_nothing_in_its_value(self, cache_format, bad, is_key):
        """Its value meets weights of 0 in rows that do not see it, and 0 times infinity is not a number."""
        cache, _ = make_caches(cache_format, 64)
        query, key, value = (torch.randn(2, heads, 64, device=DEVICE) for heads in (3, 3, 3))
        (key if is_key else value)[1, 2, 5] = bad
        rotary_store_kv_(query, key, value, cache, torch.tensor([0, 1], device=DEVICE), None)
        read_key, read_value = gpu.read_kv(cache, torch.tensor([0, 1], device=DEVICE))
        assert read_key[1, 2].isnan().all()
        assert read_key[0].isfinite().all()
        assert read_key[1, :2].isfinite().all()
        if cache_format is KvCacheFormat.INT8:
            assert cache.scales[:, 0, 2, 1].isnan().all()
        else:
            assert torch.equal(read_value[1, 2], torch.zeros_like(read_value[1, 2]))

    def test_rows_of_zeros_in_int8(self):
        cache, _ = make_caches(KvCacheFormat.INT8, 64)
        zeros = torch.zeros(1, 3, 64, device=DEVICE)
        rotary_store_kv_(zeros, zeros, zeros, cache, torch.tensor([9], device=DEVICE), None)
        for x in gpu.read_kv(cache, torch.tensor([9], device=DEVICE)):
            assert torch.equal(x, torch.zeros_like(x))

    def test_refusals(self):
        cache, plain = make_caches(KvCacheFormat.FLOAT32, 64)
        x, slots = torch.randn(2, 3, 64, device=DEVICE), torch.tensor([0, 1], device=DEVICE)
        with pytest.raises(ShapeError, match="do not fit"):
            rotary_store_kv_(x, x[:, :2], x, cache, slots, None)
        with pytest.raises(ShapeError, match="side by side"):
            rotary_store_kv_(x.transpose(1, 2).contiguous().transpose(1, 2), x, x, cache, slots, None)
        with pytest.raises(ShapeError, match="rotary pairs"):
            rotary_store_kv_(x, x, x, cache, slots, (torch.ones(2, 33), torch.ones(2, 33)))
        with pytest.raises(KernelError, match="allowed"):
            rotary_store_kv_(x, x.half(), x, cache, slots, None)
        with pytest.raises(KernelError, match="own KV caches"):
            rotary_store_kv_(x, x, x, plain, slots, None)


def test_rotary_table():
    positions, inv_freq = torch.tensor([0, 1, 4095, 131071]), torch.rand(24)
    actual = rotary_table(positions.to(DEVICE), inv_freq.to(DEVICE), 0.8)
    for mine, theirs in zip(actual, reference.rotary_table(positions, inv_freq, 0.8), strict=True):
        assert torch.allclose(mine.cpu(), theirs, atol=1e-6)


@each_format
def test_bytes_of_a_cache(cache_format):
    cache, _ = make_caches(cache_format, 80)
    assert gpu.kv_cache_num_bytes(cache.spec) == cache.data.nbytes + cache.scales.nbytes
    parts = (*cache.data, *cache.scales)
    assert [x.data_ptr() for x in cache.keys_and_values] == [x.data_ptr() for x in parts]
    assert cache.keys_and_values is cache.keys_and_values


class TestSplits:
    def test_positions(self):
        """Splits are one unit each up to the 32nd and then double their length every 16, host and device alike."""
        num_units = 4096
        of, begin = (torch.empty(num_units, dtype=torch.int32, device=DEVICE) for _ in range(2))
        _splits_kernel[(1,)](of, begin, N=num_units)
        expected, split, unit = [], 0, 0
        begins = []
        while unit < num_units:
            size = 1 if split < 32 else 2 ** ((split - 16) // 16)
            begins.append(unit)
            expected += [split] * size
            unit += size
            split += 1
        assert of.tolist() == expected[:num_units]
        assert begin[:split].tolist() == begins
        for tokens in (1, 255, 256, 257, 8192, 8193, 40000, 4096 * 256):
            assert max_num_splits(tokens, 256) == expected[(tokens - 1) // 256] + 1


@triton.jit
def _splits_kernel(of_ptr, begin_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(of_ptr + i, split_of(i))
    tl.store(begin_ptr + i, split_begin(i))


class TestWeighShare:
    @pytest.mark.parametrize(("num_ranks", "num_parts"), [(1, 1), (2, 2), (3, 3)])
    def test_against_the_reference(self, num_ranks, num_parts):
        shape = 5, 12, 40
        normalizers = [torch.rand(*shape[:2], 2) * torch.tensor([9.0, 200.0]) for _ in range(num_ranks)]
        normalizers[0][3] = torch.tensor([0.0, -torch.inf]) if num_ranks > 1 else torch.tensor([2.0, 1.0])
        for rank in range(num_ranks):
            share = AttentionShare(torch.randn(shape), normalizers[rank])
            on_device = AttentionShare(*(x.to(DEVICE) for x in share))
            actual = weigh_share(
                on_device, [x.to(DEVICE) for x in normalizers], rank, dtype=torch.float32, num_parts=num_parts
            )
            expected = reference.weigh_share(share, normalizers, rank, dtype=torch.float32, num_parts=num_parts)
            assert torch.allclose(actual.cpu(), expected, atol=1e-6, rtol=1e-5)

    def test_what_no_rank_sees_is_zero(self):
        nothing = torch.tensor([0.0, -torch.inf], device=DEVICE).expand(2, 4, 2)
        share = AttentionShare(torch.zeros(2, 4, 16, device=DEVICE), nothing)
        out = weigh_share(share, [nothing, nothing], 1, dtype=torch.float32)
        assert torch.equal(out, torch.zeros_like(out))

    def test_refusals(self):
        share = AttentionShare(torch.zeros(2, 4, 16, device=DEVICE), torch.zeros(2, 4, 2, device=DEVICE))
        with pytest.raises(ShapeError, match="parts"):
            weigh_share(share, [share.normalizers], 0, dtype=torch.float32, num_parts=3)
        with pytest.raises(KernelError, match="float32"):
            weigh_share(share, [share.normalizers.double()], 0, dtype=torch.float32)
