"""Triton's attention over the paged cache against float64: formats, softmax schemes, splits, chunks and shares."""

import math

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from triton_attention_problem import Problem, assert_right, make_problem, make_spec, write
from triton_device import DEVICE

from headrace.config import KvCacheFormat, SoftmaxScheme
from headrace.errors import KernelError, ShapeError
from headrace.kernels import reference
from headrace.kernels.dataflow import Dataflow
from headrace.kernels.triton import attention
from headrace.kernels.triton.attention import Attention
from headrace.kernels.triton.context_share import weigh_share

pytestmark = [
    pytest.mark.usefixtures("poisoned_memory"),
    # numpy's, in the interpreter, where a GPU gives infinity and NaN without a word.
    pytest.mark.filterwarnings("ignore:(overflow|invalid value|divide by zero|All-NaN):RuntimeWarning"),
]

each_scheme = pytest.mark.parametrize("scheme", list(SoftmaxScheme), ids=lambda s: s.value)
each_format = pytest.mark.parametrize("cache_format", list(KvCacheFormat), ids=lambda f: f.value)

MIXED = ((150, 1), (70, 40), (3, 3), (40, 2))
"""A token to decode, a chunk of a prompt, a whole one, and two tokens at once."""


def run(problem: Problem, spec, *, num_programs: int | None = None):
    dataflow = Dataflow()
    dataflow.max_pieces_from = {1: num_programs}
    return Attention(DEVICE, dataflow)(*problem.arguments(), spec)


class TestResults:
    @each_scheme
    def test_decoded_contexts_around_tiles_and_splits(self, scheme):
        lens = tuple((context, 1) for context in (1, 31, 65, 128, 129, 300))
        problem = make_problem(lens, num_kv_heads=1)
        assert_right(run(problem, make_spec(scheme)), problem, make_spec(scheme))

    @pytest.mark.parametrize(
        ("scheme", "window"),
        [(SoftmaxScheme.SYNCHRONIZED, 301), (SoftmaxScheme.ASYNCHRONIZED, None), (SoftmaxScheme.LAZY, 301)],
    )
    def test_more_splits_than_are_merged_at_once(self, scheme, window):
        """In the last but one lies a logit that no float32 reaches from any other split's."""
        problem = make_problem(((700, 1),), query_scale=3.0, num_kv_heads=1, group=2)
        key = problem.query[:1, :1] * (300 * 8 / problem.query[0, 0].square().sum())
        write(problem.cache, problem.slots(0)[600:601], key, torch.randn(1, 1, 64, device=DEVICE))
        spec = make_spec(scheme, sliding_window=window)
        assert_right(run(problem, spec), problem, spec)

    @each_scheme
    @pytest.mark.parametrize(("window", "cap"), [(None, None), (37, 2.0)])
    def test_batches_of_both_kinds(self, scheme, window, cap):
        problem = make_problem(MIXED, query_scale=3.0, num_kv_heads=1)
        spec = make_spec(scheme, sliding_window=window, logit_soft_cap=cap)
        assert_right(run(problem, spec), problem, spec)

    @pytest.mark.parametrize(
        ("cache_format", "dtype"),
        [
            (KvCacheFormat.FLOAT32, torch.float16),
            (KvCacheFormat.BFLOAT16, torch.bfloat16),
            (KvCacheFormat.INT8, torch.float16),
            (KvCacheFormat.INT8, torch.bfloat16),
        ],
    )
    def test_formats(self, cache_format, dtype):
        """The interpreter computes bfloat16 in float32."""
        problem = make_problem(((300, 1), (70, 40)), dtype=dtype, cache_format=cache_format, num_kv_heads=1)
        assert_right(run(problem, make_spec()), problem, make_spec())

    @pytest.mark.parametrize(
        ("head_dim", "num_kv_heads", "group", "block_size"),
        [(80, 3, 1, 8), (128, 1, 8, 32), (96, 1, 3, 16), (64, 1, 7, 1), (256, 1, 2, 16), (16, 1, 67, 24)],
    )
    def test_heads_and_blocks(self, head_dim, num_kv_heads, group, block_size):
        problem = make_problem(
            ((45, 1), (33, 9)), head_dim=head_dim, num_kv_heads=num_kv_heads, group=group, block_size=block_size
        )
        spec = make_spec(head_dim=head_dim)
        assert_right(run(problem, spec), problem, spec)

    def test_queries_among_keys_and_values(self):
        problem = make_problem(((45, 1), (33, 9)), num_kv_heads=1)
        fused = torch.full((10, 6, 64), torch.nan, device=DEVICE)
        fused[:, 1:5] = problem.query
        expected = run(problem, make_spec())
        _, *rest = problem.arguments()
        assert torch.equal(Attention(DEVICE)(fused[:, 1:5], *rest, make_spec()), expected)

    def test_a_place_without_a_sequence_gives_zeros(self):
        """A graph's batch has more places than there are sequences."""
        problem = make_problem(((20, 1), (33, 1)))
        query, cache, tables, lens, bounds = problem.arguments()
        lens[0] = 0
        tables[0] = -1
        for scheme in SoftmaxScheme:
            actual = Attention(DEVICE)(query, cache, tables, lens, bounds, make_spec(scheme))
            assert torch.equal(actual[0], torch.zeros_like(actual[0]))
            assert_right(actual[1:], problem.only(1), make_spec(scheme))
        assert cache.softmax_counts().num_rows == 8


class TestLaunches:
    """Of a single sequence the host knows what it is."""

    @pytest.mark.parametrize("new_tokens", [2, 3])
    def test_a_single_sequence_is_decoded_or_prefilled(self, new_tokens, monkeypatch):
        problem = make_problem(((40, new_tokens),), num_kv_heads=1)
        others = ("prefill_kernel",) if new_tokens <= 2 else ("split_kernel", "merge_kernel", "repair_kernel")
        for kernel in others:
            monkeypatch.setattr(attention, kernel, None)
        spec = make_spec(SoftmaxScheme.ASYNCHRONIZED)
        assert_right(run(problem, spec), problem, spec)
        assert problem.cache.softmax_counts().num_rows == 4 * new_tokens

    def test_a_batch_is_launched_with_what_was_measured_for_the_nearest_below(self, monkeypatch):
        grids = []

        class Recorded:
            def __getitem__(self, grid):
                grids.append(grid)
                return lambda *_, **__: None

        monkeypatch.setattr(attention, "split_kernel", Recorded())
        monkeypatch.setattr(attention, "merge_kernel", {(4 * n,): lambda *_, **__: None for n in (1, 2, 3, 4)})
        monkeypatch.setattr(attention, "num_multiprocessors", lambda _: 3)
        dataflow = Dataflow()
        dataflow.max_pieces_from = {1: 2, 3: 5, 4: None}
        attend = Attention(DEVICE, dataflow)
        for num_seqs in (1, 2, 3, 4):
            attend(*make_problem(((400, 1),) * num_seqs, num_kv_heads=1).arguments(), make_spec())
        assert grids == [(2,), (2,), (5,), (6,)]


class TestInvariance:
    @each_scheme
    def test_company_and_programs_do_not_show(self, scheme):
        problem = make_problem(((290, 1), (35, 33), (40, 2)), num_kv_heads=1, group=2)
        spec = make_spec(scheme, softmax={"unified_max": 0.0})
        expected = run(problem, spec)
        assert torch.equal(run(problem, spec, num_programs=1), expected)
        for seq in range(len(problem.new_lens)):
            begin, end = problem.bounds[seq : seq + 2]
            assert torch.equal(run(problem.only(seq), spec, num_programs=5), expected[begin:end])


class TestExtremes:
    @each_scheme
    @pytest.mark.parametrize("cache_format", [KvCacheFormat.FLOAT32, KvCacheFormat.INT8], ids=lambda f: f.value)
    def test_huge_and_tiny_logits(self, scheme, cache_format):
        for scale in (1e-30, 40.0):
            problem = make_problem(((140, 1), (40, 20)), query_scale=scale, cache_format=cache_format, num_kv_heads=1)
            assert_right(run(problem, make_spec(scheme)), problem, make_spec(scheme))

    @each_format
    @pytest.mark.parametrize("unified_max", [-500.0, 95.0])
    def test_a_unified_max_that_does_not_fit_is_noticed_in_every_row(self, cache_format, unified_max):
        """Rows out of range are computed again, to the bits of the synchronized scheme, and counted."""
        problem = make_problem(((140, 1), (35, 20)), cache_format=cache_format, num_kv_heads=1)
        spec = make_spec(SoftmaxScheme.ASYNCHRONIZED, softmax={"unified_max": unified_max})
        assert torch.equal(run(problem, spec), run(problem, make_spec()))
        counts = problem.cache.softmax_counts()
        assert (counts.num_rows, counts.num_recomputed_rows) == (21 * 4, 21 * 4)

    def test_only_the_rows_out_of_range_are_computed_again(self):
        """The others keep their bits; a place for a second token, and a chunk's in what is decoded, hold no row."""
        problem = make_problem(((64, 1), (64, 10)))
        spec = make_spec(SoftmaxScheme.ASYNCHRONIZED)
        sound = run(problem, spec)
        assert_right(sound, problem, spec)
        problem.query[0, 3] *= 1e3
        problem.query[5, 2] *= 1e3
        expected = run(problem, make_spec())
        before = problem.cache.softmax_counts()
        actual = run(problem, spec)
        for row in ((0, 3), (5, 2)):
            assert torch.equal(actual[row], expected[row])
            actual[row] = sound[row]
        assert torch.equal(actual, sound)
        counts = problem.cache.softmax_counts().since(before)
        assert (before.num_recomputed_rows, counts.num_rows, counts.num_recomputed_rows) == (0, 11 * 8, 2)

    def test_a_sum_that_lost_its_terms_is_not_sound(self):
        """Finite everywhere, and wrong: all logits near -86.9 of the unified maximum (flashed to nothing, most of
        them)."""
        problem = make_problem(((300, 1), (70, 9)), num_kv_heads=1, query_scale=0.5)
        spec = make_spec(SoftmaxScheme.ASYNCHRONIZED, softmax={"unified_max": 86.9})
        assert_right(run(problem, spec), problem, spec)
        assert problem.cache.softmax_counts().num_recomputed_rows == 10 * 4

    def test_the_published_test_of_each_element(self):
        problem = make_problem(((64, 1), (20, 9)), num_kv_heads=1)
        for bound, is_repeated in ((1e3, False), (1e-6, True)):
            before = problem.cache.softmax_counts()
            spec = make_spec(SoftmaxScheme.ASYNCHRONIZED, softmax={"element_bounds": (-bound, bound)})
            assert_right(run(problem, spec), problem, spec)
            counts = problem.cache.softmax_counts().since(before)
            assert (counts.num_rows, counts.num_recomputed_rows) == (40, 40 * is_repeated)

    @each_scheme
    def test_nan_in_a_query_stays_in_its_row(self, scheme):
        problem = make_problem(((100, 1), (40, 9)), num_kv_heads=1)
        expected = run(problem, make_spec(scheme))
        for token in (0, 4):
            problem.query[token, 2, 7] = torch.nan
        actual = run(problem, make_spec(scheme))
        for token in (0, 4):
            assert actual[token, 2].isnan().all()
            actual[token, 2] = expected[token, 2]
        assert torch.equal(actual, expected)

    @pytest.mark.parametrize(
        ("scheme", "cache_format"),
        [
            (SoftmaxScheme.SYNCHRONIZED, KvCacheFormat.FLOAT32),
            (SoftmaxScheme.ASYNCHRONIZED, KvCacheFormat.INT8),
            (SoftmaxScheme.LAZY, KvCacheFormat.BFLOAT16),
        ],
    )
    def test_a_bad_token_reaches_those_who_see_it_and_nobody_else(self, scheme, cache_format):
        """Written as `rotary_store_kv_` writes what is not finite."""
        problem = make_problem(((40, 20),), cache_format=cache_format)
        expected = run(problem, make_spec(scheme))
        slot = int(problem.slots(0)[30])
        block, offset = divmod(slot, 16)
        bad = problem.cache.scales if cache_format is KvCacheFormat.INT8 else problem.cache.data[:1]
        bad[:, block, 1, offset] = torch.nan
        if cache_format is not KvCacheFormat.INT8:
            problem.cache.data[1, block, 1, offset] = 0
        actual = run(problem, make_spec(scheme))
        assert actual[10:, 4:].isnan().all()
        actual[10:, 4:] = expected[10:, 4:]
        assert torch.equal(actual, expected)

    def test_logits_beyond_float32_are_never_a_number(self):
        problem = make_problem(((40, 1), (40, 20)), query_scale=1e38, num_kv_heads=1)
        write(problem.cache, problem.slots(0), *torch.full((2, 40, 1, 64), 1e3, device=DEVICE))
        for scheme in SoftmaxScheme:
            actual = run(problem, make_spec(scheme))
            assert actual[0].isnan().all()


class TestShares:
    @pytest.mark.parametrize(
        ("scheme", "window"),
        [
            (SoftmaxScheme.SYNCHRONIZED, 30),
            (SoftmaxScheme.ASYNCHRONIZED, None),
            (SoftmaxScheme.LAZY, None),
        ],
    )
    def test_shares_of_two_ranks_add_up(self, scheme, window):
        """Blocks are dealt out by turns; the second rank's softmax is computed again where the scheme allows it."""
        whole = make_problem(((150, 1), (70, 40), (9, 9), (5, 1)), num_kv_heads=1)
        spec = make_spec(scheme, sliding_window=window, softmax={"unified_max": 0.0})
        expected = Attention(DEVICE)(*whole.arguments(), spec)
        shares = [share_of(whole, rank, 2, spec) for rank in range(2)]
        normalizers = [share.normalizers for share in shares]
        parts = [
            weigh_share(share, normalizers, rank, dtype=torch.float32, num_parts=2) for rank, share in enumerate(shares)
        ]
        total = sum(parts).transpose(0, 1).reshape(expected.shape)
        assert (total - expected).abs().max() < 2e-5
        # The short context lies on the first rank alone.
        assert torch.equal(shares[1].normalizers[-1, :, 0].cpu(), torch.zeros(4))
        assert shares[1].normalizers[-1, :, 1].isneginf().all()

    def test_a_share_computed_again_refers_to_its_own_maximum(self):
        whole = make_problem(((150, 1), (70, 9)), num_kv_heads=1)
        spec = make_spec(SoftmaxScheme.ASYNCHRONIZED, softmax={"unified_max": -400.0})
        again, synchronized = (share_of(whole, 0, 1, s) for s in (spec, make_spec()))
        assert torch.equal(again.numerators, synchronized.numerators)
        assert torch.equal(again.normalizers, synchronized.normalizers)
        assert whole.cache.softmax_counts().num_recomputed_rows == 40
        sound = share_of(whole, 0, 1, make_spec(SoftmaxScheme.ASYNCHRONIZED, softmax={"unified_max": 2.0}))
        assert torch.allclose(sound.normalizers[..., 1], torch.tensor(2.0 * math.log2(math.e)))


def share_of(whole: Problem, rank: int, world_size: int, spec):
    """Each rank reads its blocks where the whole cache has them."""
    query, cache, tables, lens, bounds = whole.arguments()
    mine = torch.arange(tables.shape[1], device=DEVICE) % world_size == rank
    owned = torch.zeros(len(tables), tables.shape[1] + 1, dtype=torch.int32, device=DEVICE)
    owned[:, 1:] = mine.cumsum(0)
    return Attention(DEVICE).share(query, cache, tables[:, mine], lens, bounds, owned, spec)


class TestContract:
    def test_refusals(self):
        problem = make_problem(((20, 4),))
        query, cache, tables, lens, bounds = problem.arguments()
        attend = Attention(DEVICE)
        with pytest.raises(ShapeError, match="cannot share"):
            attend(query[:, :3], cache, tables, lens, bounds, make_spec())
        with pytest.raises(ShapeError, match="over a cache of 64"):
            attend(query[..., :32], cache, tables, lens, bounds, make_spec())
        with pytest.raises(ShapeError, match="block tables"):
            attend(query, cache, tables, lens, bounds[:1], make_spec())
        with pytest.raises(KernelError, match="float64"):
            attend(query.double(), cache, tables, lens, bounds, make_spec())
        with pytest.raises(KernelError, match="int32"):
            attend(query, cache, tables, lens.long(), bounds, make_spec())
        with pytest.raises(KernelError, match="own KV caches"):
            attend(query, reference.make_kv_cache(cache.spec), tables, lens, bounds, make_spec())
