"""Linear layers in Triton against float64 with the weights as stored: every implementation, format and odd sizes."""

import pytest
import torch

from headrace.kernels.dataflow import Dataflow
from headrace.kernels.tuning import LinearArm
from headrace.kernels.weights import DenseWeight

pytest.importorskip("triton")

from headrace.kernels.triton.dataflow import TritonMachine
from headrace.kernels.triton.linear import Linear

CPU = torch.device("cpu")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}
TRITON_ARMS = (LinearArm.GEMV, LinearArm.FLAT_GEMM)


@pytest.fixture(autouse=True)
def _poisoned_memory(monkeypatch):
    """What a kernel does not write stays NaN."""
    empty = torch.empty

    def poisoned(*args, **kwargs):
        out = empty(*args, **kwargs)
        return out.fill_(float("nan")) if out.is_floating_point() else out

    monkeypatch.setattr(torch, "empty", poisoned)


@pytest.fixture(scope="module")
def linear():
    return make_linear()


def make_linear():
    return Linear(CPU, Dataflow(TritonMachine(CPU)))


def expected(x, w, bias=None):
    out = x.double() @ w.double().T
    return out if bias is None else out + bias.double()


def assert_near(out, wanted, dtype):
    """Errors beside the largest result, as sums of many terms of either sign are off by a share of those."""
    assert out.shape == wanted.shape
    assert not out.isnan().any()
    scale = wanted.abs().max().clamp(min=1e-30) if wanted.numel() else 1.0
    assert ((out.double() - wanted).abs() / scale).max() < TOLERANCE[dtype] if wanted.numel() else True


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("arm", LinearArm, ids=lambda arm: arm.value)
@pytest.mark.parametrize(
    ("num_rows", "n", "k"), [(1, 1, 1), (1, 40, 272), (2, 33, 65), (3, 17, 640), (9, 70, 129), (66, 5, 31)]
)
def test_dense_is_the_product(linear, dtype, arm, num_rows, n, k):
    x, w, bias = (torch.randn(*size).to(dtype) for size in ((num_rows, k), (n, k), (n,)))
    assert_near(linear(x, DenseWeight(data=w), bias, arm=arm), expected(x, w, bias), dtype)
