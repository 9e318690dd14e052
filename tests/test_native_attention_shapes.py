"""Attention for heads, groups and blocks that fill neither a vector nor a tile: right, the same bits in any company."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from headrace.config import KvCacheFormat

native = pytest.importorskip("test_native_attention", reason="the native module is not built", exc_type=ImportError)
cpu, _native = native.cpu, native._native
each_target, each_format, each_scheme = native.each_target, native.each_format, native.each_scheme
make_problem, make_spec, run, store = native.make_problem, native.make_spec, native.run, native.store

SHAPES = {
    "one-entry": {"head_dim": 1, "ratio": 1},
    "less-than-a-vector": {"head_dim": 17, "ratio": 4},
    "half-a-step-and-rest": {"head_dim": 20, "ratio": 8, "block_size": 24},
    "a-step-and-rest": {"head_dim": 36, "ratio": 16},
    "a-step-and-a-half": {"head_dim": 48, "ratio": 1, "block_size": 8},
    "five-chunks": {"head_dim": 80, "ratio": 5},
    "six-chunks": {"head_dim": 96, "ratio": 4, "block_size": 32},
    "seven-chunks": {"head_dim": 112, "ratio": 3},
    "large": {"head_dim": 256, "ratio": 8, "block_size": 40},
}
each_shape = pytest.mark.parametrize("shape", list(SHAPES.values()), ids=list(SHAPES))
LENS = ((90, 90), (301, 20), (273, 1))
SETTINGS = ({}, {"sliding_window": 21}, {"logit_soft_cap": 2.0}, {"sliding_window": 130, "logit_soft_cap": 2.0})


@pytest.fixture(autouse=True)
def _two_threads():
    before = _native.num_threads()
    _native.set_num_threads(2)
    yield
    _native.set_num_threads(before)


def token_by_token(target: str, problem: "native.Problem", spec) -> Tensor:
    """Each new token of the only sequence asks alone."""
    (context,), (new,) = problem.context_lens, problem.new_lens
    return torch.cat(
        [
            run(
                target,
                replace(
                    problem,
                    query=problem.query[i : i + 1],
                    context_lens=[context - new + i + 1],
                    new_lens=[1],
                ),
                spec,
            )
            for i in range(new)
        ]
    )


@each_target
@each_format
@each_shape
def test_any_shape_is_right(target, cache_format, shape):
    problem = make_problem(cache_format, lens=LENS, **shape)
    for settings in SETTINGS:
        spec = make_spec(head_dim=shape["head_dim"], **settings)
        native.assert_right(run(target, problem, spec), problem, spec)


@each_target
@each_format
@each_shape
def test_company_does_not_show_in_any_shape(target, cache_format, shape):
    """Together and token by token: equal bits."""
    problem = make_problem(cache_format, lens=((330, 37),), **shape)
    for settings in SETTINGS:
        spec = make_spec(head_dim=shape["head_dim"], **settings)
        assert torch.equal(run(target, problem, spec), token_by_token(target, problem, spec))


@each_target
@each_format
@each_scheme
@pytest.mark.parametrize("ratio", [1, 4])
def test_values_that_are_no_numbers_reach_those_alone_who_see_them(target, cache_format, scheme, ratio):
    """Rows computed together may see different parts of a panel that has some, at both ends of a window."""
    problem = make_problem(cache_format, lens=((120, 120),), ratio=ratio)
    keys, values = (x.to(problem.query.dtype) for x in cpu.read_kv(problem.cache, problem.slots(0)))
    for window in (None, 5, 40):
        spec = make_spec(scheme, sliding_window=window)
        store(problem.cache, keys, values, problem.slots(0))
        expected = run(target, problem, spec)
        bad = values.clone()
        for position, number in ((33, torch.nan), (36, torch.inf), (47, -torch.inf), (80, torch.nan)):
            bad[position, 1] = number
        store(problem.cache, keys, bad, problem.slots(0))
        actual = run(target, problem, spec)
        sees = torch.tensor(
            [any(p <= t and (window is None or p > t - window) for p in (33, 36, 47, 80)) for t in range(120)]
        )
        assert torch.equal(actual[~sees], expected[~sees])
        assert torch.equal(actual[:, :ratio], expected[:, :ratio])
        assert not actual[sees, ratio:].isfinite().any()


@each_target
@each_format
@pytest.mark.parametrize("block_size", [16, 24])
def test_what_nobody_sees_may_be_anything(target, cache_format, block_size):
    """Before a window, behind the context and between the blocks."""
    problem = make_problem(cache_format, lens=((150, 9),), head_dim=40, block_size=block_size)
    spec = make_spec(head_dim=40, sliding_window=50)
    expected = run(target, problem, spec)
    keys, values = (x.to(problem.query.dtype) for x in cpu.read_kv(problem.cache, problem.slots(0)))
    size = problem.cache.spec.num_blocks * block_size
    poison = torch.full((size, 2, 40), torch.nan, dtype=problem.query.dtype)
    store(problem.cache, poison, poison, torch.arange(size))
    seen = slice(150 - 9 + 1 - 50, None)
    store(problem.cache, keys[seen], values[seen], problem.slots(0)[seen])
    assert torch.equal(run(target, problem, spec), expected)


@each_scheme
def test_int8_has_the_same_bits_with_every_integer_product(scheme):
    """AVX-512 alone, with BF16 and with tiles: sums of integers are exact, and all else is computed alike."""
    targets = [target for target in cpu.supported_targets() if target.startswith(("avx512", "amx"))]
    for shape in SHAPES.values():
        problem = make_problem(KvCacheFormat.INT8, lens=LENS, **shape)
        for settings in SETTINGS:
            spec = make_spec(scheme, head_dim=shape["head_dim"], **settings)
            results = [run(target, problem, spec) for target in targets]
            assert all(torch.equal(result, results[0]) for result in results)
