"""Native norms, residual additions and activations against float64, on every instruction set; odd sizes first."""

import itertools

import pytest
import torch
from torch import Tensor

from headrace.config import Activation
from headrace.errors import KernelError, ShapeError
from headrace.kernels import reference

cpu = pytest.importorskip("headrace.kernels.cpu", reason="the native module is not built", exc_type=ImportError)
_native = pytest.importorskip("headrace._native")

SIZES = (1, 2, 3, 15, 16, 17, 31, 64, 100, 257, 2048)
DTYPES = (torch.float32, torch.bfloat16)
EPS = {torch.float32: 2.0**-23, torch.bfloat16: 2.0**-8}

each_target = pytest.mark.parametrize("target", cpu.supported_targets())
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
each_activation = pytest.mark.parametrize("kind", list(Activation), ids=lambda kind: kind.value)


@pytest.fixture(autouse=True, params=[1, 3], ids=lambda n: f"{n}-threads")
def _threads(request):
    before = _native.num_threads()
    _native.set_num_threads(request.param)
    yield
    _native.set_num_threads(before)


def make_norm(target: str):
    return cpu.Norm(target, cpu.Stream())


def assert_near(actual: Tensor, expected: Tensor, dtype: torch.dtype, num_roundings: float, scale: Tensor) -> None:
    """Within so many roundings of values as large as `scale`."""
    difference = (actual.double() - expected).abs()
    assert (difference <= num_roundings * EPS[dtype] * scale.abs() + 1e-30).all(), difference.max()


@each_target
@each_dtype
@pytest.mark.parametrize("unit_offset", [False, True])
def test_rms_norm(target, dtype, unit_offset):
    for size, rows in itertools.product(SIZES, (1, 3, 40)):
        x, weight = torch.randn(rows, size).to(dtype), torch.randn(size).to(dtype)
        wide = x.double()
        normed = wide / (wide.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        expected = normed * (weight.double() + unit_offset)
        out = make_norm(target).rms_norm(x, weight, eps=1e-5, unit_offset=unit_offset)
        assert_near(
            out, expected, torch.float32, 12, normed * (1 + weight.abs().double())
        ) if dtype == torch.float32 else (assert_near(out, expected, dtype, 1.01, expected))


@each_target
@each_dtype
def test_layer_norm(target, dtype):
    for size, rows in itertools.product(SIZES, (1, 3, 40)):
        x = (torch.randn(rows, size) + 3).to(dtype)
        weight, bias = torch.randn(size).to(dtype), torch.randn(size).to(dtype)
        wide = x.double()
        centred = wide - wide.mean(-1, keepdim=True)
        expected = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double() + bias.double()
        out = make_norm(target).layer_norm(x, weight, bias, eps=1e-5)
        # The mean is off by a rounding of values of size 3, and divided by the deviation.
        scale = expected.abs() + 3 / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double().abs()
        assert_near(out, expected, torch.float32, 12, scale + bias.abs()) if dtype == torch.float32 else (
            torch.testing.assert_close(out.double(), expected, rtol=2**-8, atol=1e-3)
        )


@each_target
@each_dtype
def test_residual_is_added_first_and_kept(target, dtype):
    for size, rows in ((17, 3), (100, 1), (2048, 40)):
        x, residual, weight = (torch.randn(shape).to(dtype) for shape in ((rows, size), (rows, size), (size,)))
        total = residual + x
        expected = make_norm(target).rms_norm(total, weight, eps=1e-6)
        out = make_norm(target).rms_norm(x, weight, eps=1e-6, residual=residual)
        assert torch.equal(residual, total)
        assert torch.equal(out, expected)


@each_target
@each_dtype
def test_add(target, dtype):
    for size in (1, 17, 100, 40_000):
        residual, x = torch.randn(size).to(dtype), torch.randn(size).to(dtype)
        expected = residual + x
        make_norm(target).add_(residual, x)
        assert torch.equal(residual, expected)


@each_target
def test_norm_of_heads_inside_a_wider_row(target):
    """Query heads of a fused projection: rows with two strides."""
    fused = torch.randn(5, 9, 24)
    heads, weight = fused[:, 2:6], torch.randn(24)
    out = make_norm(target).rms_norm(heads, weight, eps=1e-6)
    torch.testing.assert_close(out, reference.rms_norm(heads, weight, eps=1e-6))
    assert out.is_contiguous()


@each_target
def test_a_row_does_not_depend_on_the_others(target):
    x, weight = torch.randn(40, 1000).bfloat16(), torch.randn(1000).bfloat16()
    whole = make_norm(target).rms_norm(x, weight, eps=1e-6)
    assert all(torch.equal(make_norm(target).rms_norm(x[i : i + 1], weight, eps=1e-6)[0], whole[i]) for i in range(40))


@each_target
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_norm_of_a_bad_row_is_nan_and_harms_no_other(target, bad):
    x, weight = torch.randn(3, 33), torch.ones(33)
    x[1, 7] = bad
    out = make_norm(target).rms_norm(x, weight, eps=1e-6)
    assert out[1, 7].isnan()
    assert out[[0, 2]].isfinite().all()


def test_norm_refuses_what_it_cannot_read():
    norm = make_norm(cpu.best_target())
    with pytest.raises(ShapeError, match="weight or bias"):
        norm.rms_norm(torch.zeros(2, 8), torch.zeros(7), eps=1e-6)
    with pytest.raises(ShapeError, match="adjacent"):
        norm.rms_norm(torch.zeros(8, 2).T, torch.zeros(8), eps=1e-6)
    with pytest.raises(ShapeError, match="residual"):
        norm.rms_norm(torch.zeros(2, 8), torch.zeros(8), eps=1e-6, residual=torch.zeros(3, 8))
    with pytest.raises(KernelError, match="float16"):
        norm.rms_norm(torch.zeros(2, 8).half(), torch.zeros(8).half(), eps=1e-6)


@each_target
@each_activation
@each_dtype
def test_activation(target, kind, dtype):
    """Every size of rest, and values from where e^x vanishes to where it overflows."""
    activate = cpu.Activate(target, cpu.Stream())
    for size in SIZES:
        x = torch.cat([torch.randn(2, size) * 4, torch.linspace(-200, 200, size)[None]]).to(dtype)
        expected = reference.activation(x.double(), kind)
        tolerance = {"rtol": 3e-6, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 2**-8, "atol": 1e-6}
        torch.testing.assert_close(activate.activation(x, kind).double(), expected, **tolerance)


@each_target
@each_activation
@each_dtype
def test_gated_activation(target, kind, dtype):
    activate = cpu.Activate(target, cpu.Stream())
    for size, rows in itertools.product(SIZES, (1, 5)):
        x = torch.randn(rows, 2 * size).to(dtype)
        gate = activate.activation(x[:, :size].contiguous(), kind)
        assert torch.equal(activate.gated_activation(x, kind), gate * x[:, size:])


@each_target
@each_activation
def test_activation_keeps_nan(target, kind):
    x = torch.tensor([[1.0, torch.nan, -1.0]])
    out = cpu.Activate(target, cpu.Stream()).activation(x, kind)
    assert out.isnan().tolist() == [[False, True, False]]
