"""Triton's norms, residual additions and activations against float64; odd sizes first."""

import itertools

import pytest
import torch
from torch import Tensor

from headrace.config import Activation
from headrace.errors import ShapeError
from headrace.kernels import reference

pytest.importorskip("triton", reason="Triton is not installed")

from triton_device import DEVICE, DTYPES

from headrace.kernels.triton import make_ops

pytestmark = pytest.mark.usefixtures("poisoned_memory")

OPS = make_ops(DEVICE)
SIZES = (1, 2, 17, 64, 100, 257, 2048)
EPS = {torch.float32: 2.0**-23, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}

each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
each_activation = pytest.mark.parametrize("kind", list(Activation), ids=lambda kind: kind.value)


def randn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape).to(DEVICE, dtype)


def assert_near(actual: Tensor, expected: Tensor, scale: Tensor) -> None:
    """Within a rounding to the dtype, and a few float32 ones of values as large as `scale`."""
    assert not actual.isnan().any()
    difference = (actual.double() - expected).abs()
    float32 = actual.dtype == torch.float32
    bound = 12 * EPS[torch.float32] * scale.abs() + (0 if float32 else EPS[actual.dtype] * expected.abs())
    assert (difference <= bound + (1e-30 if float32 else 1e-7)).all(), (difference - bound).max()


@each_dtype
@pytest.mark.parametrize("unit_offset", [False, True], ids=["plain", "unit-offset"])
def test_rms_norm(dtype, unit_offset):
    for size, rows in itertools.product(SIZES, (1, 3, 11)):
        x, weight = randn(rows, size, dtype=dtype), randn(size, dtype=dtype)
        wide = x.double()
        normed = wide / (wide.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        out = OPS["rms_norm"](x, weight, eps=1e-5, unit_offset=unit_offset)
        assert out.dtype == dtype
        assert_near(out, normed * (weight.double() + unit_offset), normed * (1 + weight.abs().double()))


@each_dtype
def test_layer_norm(dtype):
    for size, rows in itertools.product(SIZES, (1, 3, 11)):
        x = randn(rows, size, dtype=dtype) + 3
        weight, bias = randn(size, dtype=dtype), randn(size, dtype=dtype)
        wide = x.double()
        centred = wide - wide.mean(-1, keepdim=True)
        deviation = (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        expected = centred / deviation * weight.double() + bias.double()
        # The mean is off by a rounding of values of size 3, and divided by the deviation.
        scale = expected.abs() + 3 / deviation * weight.double().abs() + bias.double().abs()
        assert_near(OPS["layer_norm"](x, weight, bias, eps=1e-5), expected, scale)


@each_dtype
@pytest.mark.parametrize("layer", [False, True], ids=["rms", "layer"])
def test_residual_is_added_first_and_kept(dtype, layer):
    for rows, size in ((3, 17), (1, 100), (9, 2048)):
        x, residual, weight = (randn(*shape, dtype=dtype) for shape in ((rows, size), (rows, size), (size,)))
        parameters, norm = ((weight, weight), OPS["layer_norm"]) if layer else ((weight,), OPS["rms_norm"])
        before, total = x.clone(), residual + x
        expected = norm(total, *parameters, eps=1e-6)
        out = norm(x, *parameters, eps=1e-6, residual=residual)
        assert torch.equal(residual, total)
        assert torch.equal(out, expected)
        assert torch.equal(x, before)


@each_dtype
def test_add(dtype):
    for size in (0, 1, 17, 1023, 4099):
        residual, x = randn(size, dtype=dtype), randn(size, dtype=dtype)
        expected = residual + x
        OPS["add_"](residual, x)
        assert torch.equal(residual, expected)


def test_norm_of_heads_inside_a_wider_row():
    """Query heads of a fused projection: rows with two strides, of sizes that are no powers of two."""
    for size in (24, 128):
        fused = randn(5, 9, size)
        for heads in (fused[:, 2:6], fused[:, 8:], fused[1:2, 1:3]):
            weight = randn(size)
            out = OPS["rms_norm"](heads, weight, eps=1e-6)
            torch.testing.assert_close(out, reference.rms_norm(heads, weight, eps=1e-6))
            assert out.is_contiguous()


def test_norm_leaves_what_lies_around_a_row():
    """Writes past a row's end would land in the next row, whose program may have written before."""
    out = OPS["rms_norm"](randn(3, 65), torch.ones(65, device=DEVICE), eps=1e-6)
    assert torch.allclose(out.double().square().mean(-1), torch.ones(3, dtype=torch.float64, device=DEVICE))


def test_a_row_does_not_depend_on_the_others():
    for size in (1000, 48):
        x, weight = randn(19, size, dtype=torch.float16), randn(size, dtype=torch.float16)
        whole = OPS["rms_norm"](x, weight, eps=1e-6)
        assert all(torch.equal(OPS["rms_norm"](x[i : i + 1], weight, eps=1e-6)[0], whole[i]) for i in range(19))


@pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered:RuntimeWarning")
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_norm_of_a_bad_row_is_nan_and_harms_no_other(bad):
    x, weight = randn(3, 33), torch.ones(33, device=DEVICE)
    x[1, 7] = bad
    out = OPS["rms_norm"](x, weight, eps=1e-6)
    assert out[1, 7].isnan()
    assert out[[0, 2]].isfinite().all()


def test_no_rows_give_none():
    weight = randn(8)
    assert OPS["rms_norm"](randn(0, 8), weight, eps=1e-6).shape == (0, 8)
    assert OPS["rms_norm"](randn(0, 2, 8), weight, eps=1e-6, residual=randn(0, 2, 8)).shape == (0, 2, 8)
    assert OPS["layer_norm"](randn(0, 8), weight, weight, eps=1e-6).shape == (0, 8)
    assert OPS["activation"](randn(0, 8), Activation.SILU).shape == (0, 8)
    assert OPS["gated_activation"](randn(0, 8), Activation.SILU).shape == (0, 4)


def test_norm_refuses_what_it_cannot_read():
    rms_norm = OPS["rms_norm"]
    with pytest.raises(ShapeError, match="weight or bias"):
        rms_norm(randn(2, 8), randn(7), eps=1e-6)
    with pytest.raises(ShapeError, match="adjacent"):
        rms_norm(randn(8, 2).T, randn(8), eps=1e-6)
    with pytest.raises(ShapeError, match="residual"):
        rms_norm(randn(2, 8), randn(8), eps=1e-6, residual=randn(3, 8))
    with pytest.raises(ShapeError, match="contiguous"):
        OPS["add_"](randn(2, 8)[:, :4], randn(2, 4))
    with pytest.raises(ShapeError, match="intermediate_size"):
        OPS["gated_activation"](randn(2, 7), Activation.SILU)


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
@each_activation
@each_dtype
def test_activation(kind, dtype):
    """Values from where e^x vanishes to where it overflows."""
    for size in SIZES:
        x = torch.cat([torch.randn(2, size) * 4, torch.linspace(-200, 200, size)[None]]).to(DEVICE, dtype)
        expected = reference.activation(x.double(), kind)
        tolerance = {"rtol": 3e-6, "atol": 1e-6} if dtype == torch.float32 else {"rtol": EPS[dtype], "atol": 1e-6}
        torch.testing.assert_close(OPS["activation"](x, kind).double(), expected, **tolerance)


@each_activation
@each_dtype
def test_gated_activation(kind, dtype):
    """The activation is rounded, then the product, as if they were two ops."""
    for size, rows in itertools.product(SIZES, (1, 5)):
        x = randn(rows, 2 * size, dtype=dtype)
        gate = OPS["activation"](x[:, :size], kind)
        assert torch.equal(OPS["gated_activation"](x, kind), gate * x[:, size:])


def test_gated_activation_of_rows_that_are_apart():
    wide = randn(3, 100)
    expected = reference.gated_activation(wide[:, 10:44], Activation.SILU)
    torch.testing.assert_close(OPS["gated_activation"](wide[:, 10:44], Activation.SILU), expected)


@each_activation
def test_activation_keeps_nan(kind):
    x = torch.tensor([[1.0, torch.nan, -1.0]], device=DEVICE)
    assert OPS["activation"](x, kind).isnan().tolist() == [[False, True, False]]
