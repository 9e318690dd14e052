"""Native attention over the paged cache against float64, on every instruction set, cache format and softmax scheme."""

import itertools
import math
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from headrace.config import KvCacheFormat, SoftmaxScheme
from headrace.errors import KernelError, ShapeError
from headrace.kernels import AttentionSpec, KvCache, KvCacheSpec, SoftmaxSpec

cpu = pytest.importorskip("headrace.kernels.cpu", reason="the native module is not built", exc_type=ImportError)
_native = pytest.importorskip("headrace._native")

TARGETS = cpu.supported_targets()
each_target = pytest.mark.parametrize("target", TARGETS)
each_format = pytest.mark.parametrize("cache_format", list(KvCacheFormat), ids=lambda f: f.value)
each_scheme = pytest.mark.parametrize("scheme", list(SoftmaxScheme), ids=lambda s: s.value)

TOLERANCE = {KvCacheFormat.FLOAT32: 2e-5, KvCacheFormat.BFLOAT16: 2.0**-6, KvCacheFormat.INT8: 2.0**-6}
"""Of the largest value: probabilities and outputs are rounded to bfloat16 with a bfloat16 cache, outputs with int8."""


@pytest.fixture(autouse=True)
def _two_threads():
    before = _native.num_threads()
    _native.set_num_threads(2)
    yield
    _native.set_num_threads(before)


def dtype_of(cache_format: KvCacheFormat) -> torch.dtype:
    return torch.float32 if cache_format is KvCacheFormat.FLOAT32 else torch.bfloat16


@dataclass(frozen=True, kw_only=True)
class Problem:
    """Sequences of different lengths in one cache whose blocks lie in no order; the last new tokens of each ask.

    query: [num_tokens, num_heads, head_dim], those of the sequences end to end.
    """

    cache: KvCache
    query: Tensor
    tables: Tensor
    context_lens: list[int]
    new_lens: list[int]

    @property
    def bounds(self) -> list[int]:
        return [0, *itertools.accumulate(self.new_lens)]

    def slots(self, seq: int) -> Tensor:
        size = self.cache.spec.block_size
        positions = torch.arange(self.context_lens[seq])
        return self.tables[seq].long()[positions // size] * size + positions % size


def make_problem(
    cache_format: KvCacheFormat,
    *,
    lens: tuple[tuple[int, int], ...],
    num_kv_heads: int = 2,
    ratio: int = 4,
    head_dim: int = 64,
    block_size: int = 16,
    query_scale: float = 1.0,
    seed: int = 0,
) -> Problem:
    """lens: (context_len, new tokens) of each sequence."""
    generator = torch.Generator().manual_seed(seed)
    dtype = dtype_of(cache_format)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    widths = [-(-context // block_size) for context, _ in lens]
    spec = KvCacheSpec(
        cache_format=cache_format,
        num_blocks=sum(widths) + 3,
        block_size=block_size,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
    )
    cache = cpu.make_kv_cache(spec)
    order = torch.randperm(spec.num_blocks, generator=generator, dtype=torch.int32)
    tables = torch.full((len(lens), max(widths)), -1, dtype=torch.int32)
    for table, ids in zip(tables, order[: sum(widths)].split(widths), strict=True):
        table[: len(ids)] = ids
    num_tokens = sum(new for _, new in lens)
    problem = Problem(
        cache=cache,
        query=random(num_tokens, num_kv_heads * ratio, head_dim) * query_scale,
        tables=tables,
        context_lens=[context for context, _ in lens],
        new_lens=[new for _, new in lens],
    )
    for seq in range(len(lens)):
        slots = problem.slots(seq)
        key, value = (random(len(slots), num_kv_heads, head_dim) for _ in range(2))
        store(cache, key, value, slots)
    return problem


def store(cache: KvCache, key: Tensor, value: Tensor, slots: Tensor, target: str = TARGETS[-1]) -> None:
    no_queries = key.new_empty(len(key), 0, key.shape[2])
    cpu.RotaryStoreKv(target, cpu.Stream())(no_queries, key, value, cache, slots, None)


def make_spec(scheme: SoftmaxScheme = SoftmaxScheme.SYNCHRONIZED, head_dim: int = 64, **settings) -> AttentionSpec:
    softmax = SoftmaxSpec(scheme=scheme, **settings.pop("softmax", {}))
    return AttentionSpec(softmax_scale=head_dim**-0.5, softmax=softmax, **settings)


def run(target: str, problem: Problem, spec: AttentionSpec, *, max_pieces: int | None = None) -> Tensor:
    return cpu.Attention(target, cpu.Stream())(
        problem.query,
        problem.cache,
        problem.tables,
        torch.tensor(problem.context_lens, dtype=torch.int32),
        torch.tensor(problem.bounds, dtype=torch.int32),
        spec,
        max_pieces=max_pieces,
    )


def seen_queries(problem: Problem) -> Tensor:
    """In float64; an int8 cache is multiplied by queries of 8 bits, of each head's largest entry.

    Rounded by float32's arithmetic: one bit more or less of a huge query is seen in the result.
    """
    query = problem.query.float()
    if problem.cache.spec.cache_format is not KvCacheFormat.INT8:
        return query.double()
    scale = query.abs().amax(dim=-1, keepdim=True) / 127
    return (query * (1 / scale)).round().double() * scale.double()


def exact(problem: Problem, spec: AttentionSpec) -> Tensor:
    """Brute force in float64, over the keys and values as the cache holds them."""
    queries = seen_queries(problem)
    out = torch.empty(problem.query.shape, dtype=torch.float64)
    ratio = problem.query.shape[1] // problem.cache.spec.num_kv_heads
    for seq, (context, new) in enumerate(zip(problem.context_lens, problem.new_lens, strict=True)):
        keys, values = (
            x.double().repeat_interleave(ratio, dim=1) for x in cpu.read_kv(problem.cache, problem.slots(seq))
        )
        for i in range(new):
            row, position = problem.bounds[seq] + i, context - new + i
            first = 0 if spec.sliding_window is None else max(0, position - spec.sliding_window + 1)
            seen_keys, seen_values = keys[first : position + 1], values[first : position + 1]
            scores = torch.einsum("hd,phd->hp", queries[row], seen_keys) * spec.softmax_scale
            if spec.logit_soft_cap is not None:
                scores = spec.logit_soft_cap * torch.tanh(scores / spec.logit_soft_cap)
            out[row] = torch.einsum("hp,phd->hd", torch.softmax(scores, dim=-1), seen_values)
    return out


def assert_right(actual: Tensor, problem: Problem, spec: AttentionSpec) -> None:
    expected = exact(problem, spec)
    assert actual.isfinite().all()
    largest = max(1.0, float(expected.abs().max()))
    assert (actual.double() - expected).abs().max() <= TOLERANCE[problem.cache.spec.cache_format] * largest


class TestResults:
    @each_target
    @each_format
    @each_scheme
    def test_lengths_around_blocks_tiles_and_splits(self, target, cache_format, scheme):
        lens = ((1, 1), (2, 1), (15, 3), (16, 16), (17, 1), (31, 31), (255, 1), (256, 7), (257, 2), (701, 1))
        problem = make_problem(cache_format, lens=lens)
        assert_right(run(target, problem, make_spec(scheme)), problem, make_spec(scheme))

    @each_target
    @each_format
    @pytest.mark.parametrize("head_dim", [8, 16, 24, 80, 96, 128, 256])
    def test_head_dims(self, target, cache_format, head_dim):
        problem = make_problem(cache_format, lens=((40, 40), (33, 1)), head_dim=head_dim)
        spec = make_spec(head_dim=head_dim)
        assert_right(run(target, problem, spec), problem, spec)

    @each_target
    @each_format
    @pytest.mark.parametrize(("num_kv_heads", "ratio"), [(1, 1), (4, 1), (2, 3), (1, 8), (3, 16)])
    def test_heads_that_share(self, target, cache_format, num_kv_heads, ratio):
        problem = make_problem(cache_format, lens=((50, 20), (19, 1)), num_kv_heads=num_kv_heads, ratio=ratio)
        assert_right(run(target, problem, make_spec()), problem, make_spec())

    @each_target
    @each_scheme
    @pytest.mark.parametrize("window", [1, 5, 16, 100, 10_000])
    @pytest.mark.parametrize("cap", [None, 2.0])
    def test_windows_and_soft_caps(self, target, scheme, window, cap):
        problem = make_problem(KvCacheFormat.FLOAT32, lens=((300, 40), (90, 1), (3, 3)), query_scale=3.0)
        spec = make_spec(scheme, sliding_window=window, logit_soft_cap=cap)
        assert_right(run(target, problem, spec), problem, spec)

    @each_target
    @each_format
    @pytest.mark.parametrize("window", [7, 33, 70, 200])
    def test_windows_that_begin_in_any_panel(self, target, cache_format, window):
        """Panels are computed several at a time: what a row does not see among them counts for nothing."""
        problem = make_problem(cache_format, lens=((330, 90), (290, 1), (64, 2)), query_scale=2.0)
        spec = make_spec(sliding_window=window)
        assert_right(run(target, problem, spec), problem, spec)

    @each_target
    @each_format
    @pytest.mark.parametrize("block_size", [1, 4, 8, 24, 32])
    def test_block_sizes(self, target, cache_format, block_size):
        problem = make_problem(cache_format, lens=((70, 70), (65, 1)), block_size=block_size)
        assert_right(run(target, problem, make_spec()), problem, make_spec())


class TestInvariance:
    LENS = ((600, 600), (300, 1), (17, 5))

    @each_target
    @each_format
    @each_scheme
    def test_chunks_of_a_prompt_do_not_show(self, target, cache_format, scheme):
        """In one go, in chunks of odd sizes, and token by token: equal bits."""
        whole = make_problem(cache_format, lens=((600, 600),))
        spec = make_spec(scheme)
        expected = run(target, whole, spec)
        start = 0
        for size in (1, 7, 16, 100, 255, 1, 1, 219):
            part = Problem(
                cache=whole.cache,
                query=whole.query[start : start + size],
                tables=whole.tables,
                context_lens=[start + size],
                new_lens=[size],
            )
            assert torch.equal(run(target, part, spec), expected[start : start + size])
            start += size
        assert start == 600

    @each_target
    @each_format
    @each_scheme
    def test_company_threads_and_pieces_do_not_show(self, target, cache_format, scheme):
        problem = make_problem(cache_format, lens=self.LENS)
        spec = make_spec(scheme)
        expected = run(target, problem, spec)
        for num_threads, max_pieces in itertools.product((1, 3), (None, 1, 2, 5)):
            _native.set_num_threads(num_threads)
            assert torch.equal(run(target, problem, spec, max_pieces=max_pieces), expected)
        for seq, (begin, end) in enumerate(itertools.pairwise(problem.bounds)):
            alone = Problem(
                cache=problem.cache,
                query=problem.query[begin:end],
                tables=problem.tables[seq : seq + 1],
                context_lens=problem.context_lens[seq : seq + 1],
                new_lens=problem.new_lens[seq : seq + 1],
            )
            assert torch.equal(run(target, alone, spec), expected[begin:end])

    @each_format
    def test_what_lies_past_the_context_is_never_read(self, cache_format):
        problem = make_problem(cache_format, lens=((20, 4),))
        expected = run(TARGETS[-1], problem, make_spec())
        past = problem.tables[0, 1].long() * 16 + torch.arange(4, 16)
        poison = torch.full((12, 2, 64), torch.nan, dtype=problem.query.dtype)
        store(problem.cache, poison, poison, past)
        assert torch.equal(run(TARGETS[-1], problem, make_spec()), expected)


class TestExtremes:
    @each_target
    @each_format
    @each_scheme
    @pytest.mark.parametrize("query_scale", [1e-30, 30.0, 1e4])
    def test_tiny_and_huge_logits(self, target, cache_format, scheme, query_scale):
        problem = make_problem(cache_format, lens=((300, 30), (40, 1)), query_scale=query_scale)
        actual = run(target, problem, make_spec(scheme))
        if query_scale == 1e4:
            # Which key wins may hang on the last bit of a score: only that some mixture of values comes out.
            assert actual.isfinite().all()
            values = cpu.read_kv(problem.cache, problem.slots(0))[1]
            assert (
                actual.abs().max() <= values.abs().max() * 1.02 + cpu.read_kv(problem.cache, problem.slots(1))[1].max()
            )
        else:
            assert_right(actual, problem, make_spec(scheme))

    @each_target
    @each_format
    @pytest.mark.parametrize("unified_max", [-500.0, -100.0, 95.0, 300.0])
    def test_a_unified_max_that_does_not_fit_is_noticed_in_every_row(self, target, cache_format, unified_max):
        """The asynchronized scheme is never wrong: rows out of range are computed again, and counted."""
        problem = make_problem(cache_format, lens=((200, 9), (30, 1)))
        spec = make_spec(SoftmaxScheme.ASYNCHRONIZED, softmax={"unified_max": unified_max})
        assert torch.equal(run(target, problem, spec), run(target, problem, make_spec()))
        counts = problem.cache.softmax_counts()
        assert counts.num_recomputed_rows == 10 * 8
        assert counts.num_rows >= counts.num_recomputed_rows

    @each_target
    @each_format
    def test_a_fitting_unified_max_recomputes_nothing(self, target, cache_format):
        problem = make_problem(cache_format, lens=((200, 9),))
        spec = make_spec(SoftmaxScheme.ASYNCHRONIZED)
        assert_right(run(target, problem, spec), problem, spec)
        assert problem.cache.softmax_counts().num_recomputed_rows == 0

    @each_target
    def test_only_the_rows_out_of_range_are_computed_again(self, target):
        problem = make_problem(KvCacheFormat.FLOAT32, lens=((64, 4),))
        problem.query[2, 5] *= 1e3
        spec = make_spec(SoftmaxScheme.ASYNCHRONIZED)
        run(target, problem, spec)
        assert problem.cache.softmax_counts().num_recomputed_rows == 1

    @each_target
    def test_the_published_test_of_each_element(self, target):
        problem = make_problem(KvCacheFormat.FLOAT32, lens=((64, 4),))
        logits = problem.query.double().abs().max() * math.sqrt(64)
        wide = make_spec(
            SoftmaxScheme.ASYNCHRONIZED, softmax={"element_bounds": (-float(logits) * 9, float(logits) * 9)}
        )
        tight = make_spec(SoftmaxScheme.ASYNCHRONIZED, softmax={"element_bounds": (-1e-6, 1e-6)})
        assert_right(run(target, problem, wide), problem, wide)
        assert problem.cache.softmax_counts().num_recomputed_rows == 0
        assert torch.equal(run(target, problem, tight), run(target, problem, make_spec()))
        assert problem.cache.softmax_counts().num_recomputed_rows == 4 * 8

    @each_target
    @each_format
    @each_scheme
    def test_nan_in_a_query_stays_in_its_row(self, target, cache_format, scheme):
        problem = make_problem(cache_format, lens=((100, 5),))
        expected = run(target, problem, make_spec(scheme))
        problem.query[3, 2, 7] = torch.nan
        actual = run(target, problem, make_spec(scheme))
        assert actual[3, 2].isnan().all()
        actual[3, 2] = expected[3, 2]
        assert torch.equal(actual, expected)

    @each_target
    @each_format
    @each_scheme
    @pytest.mark.parametrize("bad", [torch.nan, torch.inf])
    def test_a_bad_key_or_value_reaches_those_who_see_it(self, target, cache_format, scheme, bad):
        """Never a number that looks right: later rows are NaN, or infinite where a value is; earlier ones keep their
        bits."""
        for is_key in (True, False):
            problem = make_problem(cache_format, lens=((100, 100),))
            expected = run(target, problem, make_spec(scheme))
            key, value = (x.to(problem.query.dtype) for x in cpu.read_kv(problem.cache, problem.slots(0)[50:51]))
            (key if is_key else value)[0, 1, :] = bad
            store(problem.cache, key, value, problem.slots(0)[50:51])
            actual = run(target, problem, make_spec(scheme))
            assert torch.equal(actual[:50], expected[:50])
            if not is_key or math.isnan(bad):
                assert not actual[50:, 4:].isfinite().any()


class TestInt8Probabilities:
    """Two digits hold p times a value's scale: what decides is the largest product, wherever p and scales are large."""

    @each_target
    @each_scheme
    @pytest.mark.parametrize("sink_value", [0.0, 0.03], ids=["nothing", "little"])
    def test_a_token_that_draws_all_attention_to_next_to_no_value(self, target, scheme, sink_value):
        """The rest of the tile, each e^-11 of it, is then the whole result (Xiao et al. 2024)."""
        problem = make_problem(KvCacheFormat.INT8, lens=((250, 3),), query_scale=0.5)
        signs = torch.tensor([1.0, -1.0]).repeat(32)
        problem.query.add_(signs * 11 / 8)
        keys, values = cpu.read_kv(problem.cache, problem.slots(0))
        keys -= (keys * signs).mean(-1, keepdim=True) * signs
        keys[0] = signs
        values[0] *= sink_value
        store(problem.cache, keys, values, problem.slots(0))
        assert_close_to_exact(target, problem, make_spec(scheme))

    @each_target
    @pytest.mark.parametrize("sigma", [2.0, 20.0])
    @pytest.mark.parametrize("block_size", [16, 24])
    def test_values_of_very_different_size(self, target, sigma, block_size):
        """Zero too, beside places that nobody sees with infinite and huge values."""
        problem = make_problem(KvCacheFormat.INT8, lens=((300, 40), (41, 1)), block_size=block_size)
        generator = torch.Generator().manual_seed(1)
        size = problem.cache.spec.num_blocks * block_size
        stale = torch.tensor([torch.inf, 1e36]).repeat(size * 64)[: size * 2 * 64].view(size, 2, 64)
        seen = [cpu.read_kv(problem.cache, problem.slots(seq)) for seq in range(2)]
        store(problem.cache, stale, stale, torch.arange(size))
        for seq, (keys, values) in enumerate(seen):
            exponents = sigma * torch.randn(*values.shape[:2], 1, generator=generator)
            values *= exponents.exp()
            values[::7] = 0
            store(problem.cache, keys, values, problem.slots(seq))
        for window in (None, 21):
            assert_close_to_exact(target, problem, make_spec(sliding_window=window))

    @each_target
    @pytest.mark.parametrize("mantissa", [1.0, 1.25, 1.44, 1.99])
    def test_sums_of_the_largest_digits_do_not_overflow(self, target, mantissa):
        """Every position of a tile with the largest p, value and scale."""
        problem = make_problem(KvCacheFormat.INT8, lens=((256, 1),))
        values = torch.full((256, 2, 64), 127 * mantissa)
        values[:, 1] *= -1
        store(problem.cache, torch.zeros_like(values), values, problem.slots(0))
        for dtype in (torch.float32, torch.bfloat16):
            out = run(target, replace(problem, query=problem.query.to(dtype)), make_spec())
            assert torch.equal(out.sign(), values[:1].sign().repeat_interleave(4, dim=1).to(dtype))
            assert (out.abs() / (127 * mantissa) - 1).abs().max() <= torch.finfo(dtype).eps / 2 + 2.0**-13

    @each_target
    def test_a_later_value_of_the_same_panel_does_not_show(self, target):
        """Nor does its scale: a prompt's rows keep their bits whatever comes behind them."""
        problem = make_problem(KvCacheFormat.INT8, lens=((40, 40),))
        keys, values = cpu.read_kv(problem.cache, problem.slots(0))
        expected = run(target, problem, make_spec())
        for seen, size in ((1, 1e30), (20, 1e-30), (33, torch.inf)):
            store(problem.cache, keys[seen:], values[seen:] * size, problem.slots(0)[seen:])
            assert torch.equal(run(target, problem, make_spec())[:seen], expected[:seen])
            store(problem.cache, keys, values, problem.slots(0))


def assert_close_to_exact(target: str, problem: Problem, spec: AttentionSpec) -> None:
    """Within a thousandth of the largest entry of each head's result, which rounding to bfloat16 would exceed."""
    problem = replace(problem, query=problem.query.float())
    expected = exact(problem, spec)
    error = (run(target, problem, spec).double() - expected).abs().amax(-1)
    assert (error <= 1e-3 * expected.abs().amax(-1)).all()


class TestContract:
    def test_refusals(self):
        problem = make_problem(KvCacheFormat.FLOAT32, lens=((20, 4),))
        attention = cpu.Attention(TARGETS[-1], cpu.Stream())
        lens, bounds = torch.tensor([20], dtype=torch.int32), torch.tensor([0, 4], dtype=torch.int32)
        with pytest.raises(ShapeError, match="cannot share"):
            attention(problem.query[:, :3], problem.cache, problem.tables, lens, bounds, make_spec())
        with pytest.raises(ShapeError, match="over a cache of 64"):
            attention(problem.query[..., :32], problem.cache, problem.tables, lens, bounds, make_spec())
        with pytest.raises(KernelError, match="float16"):
            attention(problem.query.half(), problem.cache, problem.tables, lens, bounds, make_spec())
        with pytest.raises(KernelError, match="int32"):
            attention(problem.query, problem.cache, problem.tables, lens.long(), bounds, make_spec())
        with pytest.raises(IndexError):
            attention(problem.query, problem.cache, problem.tables + 1000, lens, bounds, make_spec())
        with pytest.raises(IndexError):
            attention(problem.query, problem.cache, problem.tables, lens + 1000, bounds, make_spec())
