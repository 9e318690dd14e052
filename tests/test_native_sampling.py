"""Native argmax, top-k and log-sum-exp of logits against the reference, on every instruction set."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from headrace.errors import ShapeError
from headrace.kernels import reference

cpu = pytest.importorskip("headrace.kernels.cpu", reason="the native module is not built", exc_type=ImportError)

TARGETS = cpu.supported_targets()
each_target = pytest.mark.parametrize("target", TARGETS)

# Few distinct values, so that equals are common; zeros of both signs and infinities among them.
logits_with_ties = hnp.arrays(
    np.float32,
    st.tuples(st.integers(1, 3), st.integers(1, 300)),
    elements=st.sampled_from([-np.inf, -1.5, -0.0, 0.0, 2.0]),
)
any_logits = hnp.arrays(np.float32, st.tuples(st.integers(1, 3), st.integers(1, 80)), elements=st.floats(width=32))


@given(logits=any_logits, target=st.sampled_from(TARGETS))
def test_argmax_is_that_of_numpy(logits, target):
    ids, values = cpu.Sampling(target, cpu.Stream()).argmax(torch.from_numpy(logits))
    assert ids.tolist() == logits.argmax(axis=1).tolist()
    np.testing.assert_array_equal(values.numpy(), logits.max(axis=1))


@given(logits=logits_with_ties, k=st.integers(0, 310), target=st.sampled_from(TARGETS))
def test_top_k_orders_by_logit_and_then_by_id(logits, k, target):
    ids = cpu.Sampling(target, cpu.Stream()).top_k(torch.from_numpy(logits), k)
    expected = np.argsort(-logits, axis=1, kind="stable")[:, :k]
    assert ids.tolist() == expected.tolist()
    assert reference.top_k(torch.from_numpy(logits), k).tolist() == expected.tolist()


@each_target
@pytest.mark.parametrize("vocab_size", [1, 2, 255, 256, 257, 32_000, 128_256])
def test_whole_vocabularies(target, vocab_size):
    logits = torch.randn(5, vocab_size) * 5
    sampling = cpu.Sampling(target, cpu.Stream())
    assert torch.equal(sampling.argmax(logits)[0], reference.argmax(logits)[0])
    assert torch.equal(sampling.top_k(logits, 50), reference.top_k(logits, 50))
    torch.testing.assert_close(sampling.log_sum_exp(logits), reference.log_sum_exp(logits), rtol=1e-6, atol=1e-6)


@each_target
@pytest.mark.parametrize("offset", [-1e30, -1e4, 0.0, 1e4, 1e30])
def test_log_sum_exp_of_far_logits(target, offset):
    logits = torch.randn(2, 1000) + offset
    torch.testing.assert_close(
        cpu.Sampling(target, cpu.Stream()).log_sum_exp(logits), reference.log_sum_exp(logits), rtol=1e-6, atol=1e-6
    )


@each_target
def test_log_sum_exp_with_masks_and_bad_rows(target):
    logits = torch.zeros(4, 100)
    logits[0, 1:] = -torch.inf
    logits[1] = -torch.inf
    logits[2, 5] = torch.nan
    logits[3, 5] = torch.inf
    out = cpu.Sampling(target, cpu.Stream()).log_sum_exp(logits)
    assert out[:2].tolist() == [0.0, -torch.inf]
    assert out[2].isnan()
    assert out[3] == torch.inf


@each_target
def test_rows_of_a_wider_matrix_and_one_that_must_be_copied(target):
    wide, sampling = torch.randn(4, 700), cpu.Sampling(target, cpu.Stream())
    assert torch.equal(sampling.argmax(wide[:, 100:400])[0], wide[:, 100:400].argmax(1))
    assert torch.equal(sampling.top_k(wide.T, 3), reference.top_k(wide.T, 3))


def test_shapes_are_checked():
    with pytest.raises(ShapeError, match="vocab_size"):
        cpu.Sampling(cpu.best_target(), cpu.Stream()).argmax(torch.zeros(5))
