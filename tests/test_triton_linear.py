"""Linear layers in Triton against float64 with the weights as stored: every implementation, format and odd sizes."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from plain_quantizer import pack, plain_dequantize, plain_quantize

from headrace.config import WeightFormat
from headrace.errors import KernelError, ShapeError
from headrace.kernels import KernelChoice, QuantizedWeight, resolve_kernels
from headrace.kernels.dataflow import Dataflow
from headrace.kernels.tuning import LinearArm, Tiles
from headrace.kernels.weights import BlockedWeight, DenseWeight

pytest.importorskip("triton", reason="Triton is not installed")

from triton_device import DEVICE
from triton_device import DTYPES as ROUNDED_DTYPES

from headrace.kernels.triton.dataflow import TritonMachine
from headrace.kernels.triton.gather import embedding
from headrace.kernels.triton.linear import Linear
from headrace.kernels.triton.weights import as_quantized, make_weight_builder, weight_num_bytes, weight_rows

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
"""The interpreter's bfloat16 is right here but for products, which take float32 there, and for the last bit of what is
rounded to it: `ROUNDED_DTYPES` are without it there."""

TOLERANCE = {torch.float32: 3e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}
QUANTIZED = (WeightFormat.INT8, WeightFormat.INT4)
HALF_EPS = 2.0**-11
"""Relative error of a scale kept in float16."""

SIZES = ((1, 1, 1), (1, 20, 272), (3, 17, 130), (9, 35, 65), (18, 5, 31))
"""M, N, K: below, at and past tiles, groups, blocks and what tensor cores take."""

each_arm = pytest.mark.parametrize("arm", LinearArm, ids=lambda arm: arm.value)
each_own_arm = pytest.mark.parametrize("arm", [LinearArm.GEMV, LinearArm.FLAT_GEMM], ids=lambda arm: arm.value)
each_quantized = pytest.mark.parametrize("weight_format", QUANTIZED, ids=lambda f: f.value)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


class FixedTiles(TritonMachine):
    """One choice of tiles for every shape."""

    def __init__(self, tiles: Tiles) -> None:
        super().__init__(DEVICE)
        self._tiles = tiles

    def tiles(self, shape, arm):
        return [self._tiles]


@pytest.fixture(autouse=True)
def _poisoned_memory(monkeypatch):
    """What a kernel does not write stays NaN."""
    empty = torch.empty

    def poisoned(*args, **kwargs):
        out = empty(*args, **kwargs)
        return out.fill_(float("nan")) if out.is_floating_point() else out.fill_(77)

    monkeypatch.setattr(torch, "empty", poisoned)


@pytest.fixture(scope="module")
def linear():
    return Linear(DEVICE, Dataflow(TritonMachine(DEVICE)))


def linear_with(**tiles):
    return Linear(DEVICE, Dataflow(FixedTiles(Tiles(**tiles))))


def randn(*size, dtype=torch.float32):
    return torch.randn(*size).to(DEVICE, dtype)


def random_quantized(weight_format, n, k, generator=None):
    """A blocked weight and the float64 matrix it stands for: scales are such that float16 holds them."""
    low = -127 if weight_format is WeightFormat.INT8 else -8
    q = torch.randint(low, 128 if weight_format is WeightFormat.INT8 else 8, (n, k)).numpy()
    scales = (1 + torch.randint(0, 1024, (n, -(-k // 32))) / 1024.0) * 2.0 ** torch.randint(-9, 3, (n, -(-k // 32)))
    scales = (scales * torch.randint(0, 2, scales.shape).mul(2).sub(1)).float()
    builder = make_weight_builder(weight_format, n, k, device=DEVICE)
    builder.write_quantized(0, torch.from_numpy(pack(q, weight_format)), scales)
    return builder.build(), torch.from_numpy(plain_dequantize(q, scales.numpy())).to(DEVICE)


def expected(x, w, bias=None):
    out = x.double() @ w.double().T
    return out if bias is None else out + bias.double()


def assert_near(out, wanted, dtype):
    """Errors beside the largest result, as sums of many terms of either sign are off by a share of those."""
    assert out.shape == wanted.shape
    assert not out.isnan().any()
    if wanted.numel():
        error = (out.double() - wanted).abs().max() / wanted.abs().max().clamp(min=1e-30)
        assert error < TOLERANCE[dtype], float(error)


@each_dtype
@each_arm
@pytest.mark.parametrize(("num_rows", "n", "k"), SIZES)
def test_dense_is_the_product(linear, dtype, arm, num_rows, n, k):
    x, w, bias = randn(num_rows, k, dtype=dtype), randn(n, k, dtype=dtype), randn(n, dtype=dtype)
    assert_near(linear(x, DenseWeight(data=w), bias, arm=arm), expected(x, w, bias), dtype)


@each_dtype
@each_arm
@each_quantized
@pytest.mark.parametrize(("num_rows", "n", "k"), SIZES)
def test_quantized_is_the_product_with_what_integers_and_scales_stand_for(
    linear, dtype, arm, weight_format, num_rows, n, k
):
    weight, w = random_quantized(weight_format, n, k)
    x, bias = randn(num_rows, k, dtype=dtype), randn(n, dtype=dtype)
    if arm is LinearArm.GEMM:
        w = w.to(dtype)  # expanded to the type of x
    out = linear(x, weight, bias, arm=arm)
    assert out.dtype == dtype
    assert_near(out, expected(x, w, bias), dtype)


@settings(max_examples=12, deadline=None)
@given(
    st.sampled_from([None, *QUANTIZED]),
    st.sampled_from(LinearArm),
    st.integers(0, 10),
    st.integers(0, 20),
    st.integers(0, 150),
)
def test_any_shape(weight_format, arm, num_rows, n, k):
    linear = Linear(DEVICE, Dataflow(TritonMachine(DEVICE)))
    if weight_format is None:
        w = randn(n, k)
        weight = DenseWeight(data=w)
    else:
        weight, w = random_quantized(weight_format, n, k)
    x = randn(num_rows, k)
    assert_near(linear(x, weight, arm=arm), expected(x, w), torch.float32)


@pytest.mark.parametrize("num_splits", [1, 2, 8])
@pytest.mark.parametrize("weight_format", [None, *QUANTIZED], ids=str)
def test_splits_of_k_give_the_product_time_and_again(weight_format, num_splits):
    """Counters are left as they were found: a second launch finds the same, and no float atomics make it differ.
    With 8 splits of 5 steps of 64 columns, some have nothing to add."""
    linear = linear_with(block_n=16, block_k=64, num_splits=num_splits, num_stages=2)
    k = 300
    weight, w = random_quantized(weight_format, 18, k) if weight_format else (None, randn(18, k))
    weight = weight or DenseWeight(data=w)
    x, bias = randn(66, k), randn(18)
    outs = [linear(x, weight, bias, arm=LinearArm.FLAT_GEMM) for _ in range(2)]
    assert_near(outs[0], expected(x, w, bias), torch.float32)
    assert all(torch.equal(outs[0], out) for out in outs[1:])


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@each_own_arm
@pytest.mark.parametrize("weight_format", [None, *QUANTIZED], ids=str)
def test_a_row_does_not_depend_on_its_batch_mates(linear, weight_format, arm):
    weight = random_quantized(weight_format, 30, 200)[0] if weight_format else DenseWeight(data=randn(30, 200))
    x = randn(8, 200)
    out = linear(x, weight, arm=arm)
    for i, count in ((0, 3), (2, 3), (0, 8), (7, 8)):
        # Of 3 rows and of 8, GEMV and flat GEMM fill up to the same number.
        others = randn(count, 200) * 1e4
        others[-1] = float("inf")
        others[min(i, count - 1)] = x[i]
        assert torch.equal(linear(others, weight, arm=arm)[min(i, count - 1)], out[i])


@each_arm
@pytest.mark.parametrize("weight_format", [None, *QUANTIZED], ids=str)
def test_x_may_be_part_of_a_larger_tensor(linear, weight_format, arm):
    weight, w = random_quantized(weight_format, 9, 70) if weight_format else (None, randn(9, 70))
    weight = weight or DenseWeight(data=w)
    wide = randn(5, 200)
    for x in (wide[:, 3:73], wide[::2, 130:], randn(70, 5).T, wide[0, :70], wide[:4, :140].view(4, 2, 70)):
        assert_near(linear(x, weight, arm=arm), expected(x, w), torch.float32)


@each_arm
@pytest.mark.parametrize("dtype", ROUNDED_DTYPES[1:], ids=str)
def test_a_float32_result_keeps_the_accumulators(linear, dtype, arm):
    x, w, bias = randn(4, 160, dtype=dtype), randn(12, 160, dtype=dtype), randn(12, dtype=dtype)
    out = linear(x, DenseWeight(data=w), bias, arm=arm, out_dtype=torch.float32)
    assert out.dtype == torch.float32
    assert_near(out, expected(x, w, bias), torch.float32)
    weight, w = random_quantized(WeightFormat.INT8, 12, 160)
    if arm is LinearArm.GEMM:
        w = w.to(dtype)
    out = linear(x, weight, bias, arm=arm, out_dtype=torch.float32)
    assert out.dtype == torch.float32
    assert_near(out, expected(x, w, bias), torch.float32)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_infinities_and_nan_stay_in_their_row(linear):
    weight, _ = random_quantized(WeightFormat.INT4, 9, 130)
    x = randn(3, 130)
    x[1, 129] = float("nan")
    for arm in LinearArm:
        out = linear(x, weight, arm=arm)
        assert out[1].isnan().all()
        assert out[[0, 2]].isfinite().all()


@pytest.mark.parametrize(
    ("x", "weight", "bias", "error", "message"),
    [
        (torch.ones(2, 3), DenseWeight(data=torch.ones(4, 5)), None, ShapeError, "input has 3 columns"),
        (torch.ones(2, 5), DenseWeight(data=torch.ones(4, 5)), torch.ones(3), ShapeError, r"bias is \[3\]"),
        (torch.ones(2, 5), DenseWeight(data=torch.ones(4, 5).half()), None, KernelError, "the same for both"),
        (torch.ones(2, 5).long(), DenseWeight(data=torch.ones(4, 5).long()), None, KernelError, "allowed: torch.float"),
        (
            torch.ones(2, 4),
            QuantizedWeight(
                weight_format=WeightFormat.INT8,
                qweight=torch.ones(4, 4).to(torch.int8),
                scales=torch.ones(4, 1),
                in_features=4,
            ),
            None,
            KernelError,
            "not QuantizedWeight",
        ),
    ],
)
def test_what_does_not_fit_is_refused(linear, x, weight, bias, error, message):
    with pytest.raises(error, match=message):
        linear(x, weight, bias)


# Weights


@each_quantized
@pytest.mark.parametrize(("n", "k"), [(1, 1), (5, 63), (18, 64), (7, 161)])
def test_a_builder_stores_what_the_definition_says(weight_format, n, k):
    """Rows in blocks of several sizes; integers to the bit, scales to float16's share or the row's largest."""
    rows = torch.randn(n, k)
    rows[0, : k // 2] = 0.0
    rows[-1] *= 1e-30
    builder = make_weight_builder(weight_format, n, k, device=DEVICE)
    for start in (*range(0, n // 2), n // 2):
        builder.write(start, rows[start : start + 1] if start < n // 2 else rows[start:].to(torch.float32))
    weight = builder.build()
    q, scales = plain_quantize(rows.numpy(), weight_format)
    found = as_quantized(weight)
    assert np.array_equal(found.qweight.cpu().numpy(), pack(q, weight_format))
    largest = np.abs(scales).max(axis=1, keepdims=True)
    assert (
        np.abs(found.scales.cpu().numpy() - scales) <= np.maximum(HALF_EPS * np.abs(scales), largest * 2.0**-25)
    ).all()
    assert weight.shape == (n, k)
    assert weight.num_bytes == weight_num_bytes(weight_format, n, k)


@pytest.mark.parametrize("weight_format", [WeightFormat.FLOAT32, WeightFormat.BFLOAT16], ids=lambda f: f.value)
def test_a_builder_stores_dense_rows(weight_format):
    rows = torch.randn(5, 7)
    builder = make_weight_builder(weight_format, 5, 7, device=DEVICE)
    builder.write(3, rows[3:])
    builder.write(0, rows[:3])
    weight = builder.build()
    assert torch.equal(weight.data.cpu(), rows.to(weight.data.dtype))
    assert weight.num_bytes == weight_num_bytes(weight_format, 5, 7)
    with pytest.raises(NotImplementedError, match="floating-point"):
        builder.write_quantized(0, rows, rows)


@each_quantized
def test_a_builder_refuses_what_cannot_be_stored(weight_format):
    builder = make_weight_builder(weight_format, 2, 40, device=DEVICE)
    columns = 40 if weight_format is WeightFormat.INT8 else 20
    values, scales = torch.zeros(2, columns, dtype=torch.uint8), torch.ones(2, 2)
    for block in (torch.randn(2, 39), torch.randn(40)):
        with pytest.raises(ShapeError, match="40 columns"):
            builder.write(0, block)
    with pytest.raises(ShapeError, match="2 rows of values, 1 of scales"):
        builder.write_quantized(0, values, scales[:1])
    with pytest.raises(ShapeError, match="rows of 2 columns"):
        builder.write_quantized(0, values, scales[:, :1])
    for bad in (float("nan"), float("inf")):
        with pytest.raises(KernelError, match="NaN or infinit"):
            builder.write_quantized(0, values, scales * bad)
        with pytest.raises(KernelError, match="NaN or infinity"):
            builder.write(0, torch.full((1, 40), bad))


@each_arm
@pytest.mark.parametrize("weight_format", [None, *QUANTIZED], ids=str)
def test_rows_of_a_weight_are_a_weight_in_the_same_memory(linear, weight_format, arm):
    weight, w = random_quantized(weight_format, 50, 100) if weight_format else (None, randn(50, 100))
    weight = weight or DenseWeight(data=w)
    part = weight_rows(weight, range(16, 43))
    memory = (lambda a: a.values.untyped_storage().data_ptr()) if isinstance(weight, BlockedWeight) else None
    assert memory is None or memory(part) == memory(weight)
    x = randn(3, 100)
    assert_near(linear(x, part, arm=arm), expected(x, w[16:43]), torch.float32)
    assert part.num_bytes < weight.num_bytes


# Embedding


@pytest.mark.parametrize("dtype", ROUNDED_DTYPES, ids=str)
@pytest.mark.parametrize("weight_format", [None, *QUANTIZED], ids=str)
@pytest.mark.parametrize(("n", "k"), [(9, 1), (20, 130), (3, 1100)])
def test_embedding_is_the_scaled_row(weight_format, dtype, n, k):
    weight, w = random_quantized(weight_format, n, k) if weight_format else (None, randn(n, k, dtype=dtype))
    weight = weight or DenseWeight(data=w)
    ids = torch.tensor([n - 1, 0, n // 2, 0], device=DEVICE) + 5
    out = embedding(ids, weight, dtype=dtype, scale=1.7, offset=-5)
    rows = w[ids - 5].float().to(dtype).float()
    assert torch.equal(out, (rows * np.float32(1.7)).to(dtype))


@pytest.mark.parametrize("weight_format", [None, *QUANTIZED], ids=str)
def test_embedding_of_ids_outside(weight_format):
    weight, w = random_quantized(weight_format, 20, 70) if weight_format else (None, randn(20, 70))
    weight = weight or DenseWeight(data=w)
    ids = torch.tensor([[-1, 3], [20, 10**9], [19, -(10**9)]], device=DEVICE)
    out = embedding(ids, weight, dtype=torch.float32, zeros_outside=True)
    inside = (ids >= 0) & (ids < 20)
    assert torch.equal(out[inside], w[ids[inside]].float())
    assert (out[~inside] == 0).all()
    assert embedding(ids, weight, dtype=torch.float32)[~inside].isnan().all()
    assert embedding(ids[:0], weight, dtype=torch.float32).shape == (0, 2, 70)


# In use


def test_dispatch_makes_these_ops_one_set():
    kernels = resolve_kernels(KernelChoice.TRITON, device=DEVICE)
    implementations = {choice.op: choice.implementation for choice in kernels.explain()}
    for op in ("linear", "embedding", "make_weight_builder", "weight_num_bytes", "weight_rows"):
        assert implementations[op] == "triton"
    builder = kernels.make_weight_builder(WeightFormat.INT4, 10, 40)
    rows = torch.randn(10, 40)
    builder.write(0, rows)
    weight = builder.build()
    x = randn(2, 40)
    q, scales = plain_quantize(rows.numpy(), WeightFormat.INT4)
    wanted = expected(x.cpu(), torch.from_numpy(plain_dequantize(q, scales)))
    assert ((kernels.linear(x, weight).cpu() - wanted).abs().max() / wanted.abs().max()) < 2 * HALF_EPS
