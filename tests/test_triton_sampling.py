"""Triton's argmax, top-k and log-sum-exp of logits against their definitions."""

import numpy as np
import pytest
import torch

from headrace.config import SamplingParams
from headrace.engine.device_sampler import DeviceSampler
from headrace.engine.sampler import Sampler, SamplingRow
from headrace.errors import ShapeError
from headrace.kernels import KernelChoice, reference, resolve_kernels

pytest.importorskip("triton", reason="Triton is not installed")

from triton_device import DEVICE

from headrace.kernels.triton import make_ops

pytestmark = pytest.mark.usefixtures("poisoned_memory")

OPS = make_ops(DEVICE)
INF, NAN = float("inf"), float("nan")


def with_ties(num_rows: int, vocab_size: int, values: list[float]) -> np.ndarray:
    """Few distinct values, so that equals are common."""
    generator = np.random.default_rng(vocab_size)
    return generator.choice(np.array(values, np.float32), (num_rows, vocab_size))


@pytest.mark.parametrize("vocab_size", [1, 2, 255, 4096, 4097, 9001])
def test_argmax_is_that_of_numpy(vocab_size):
    for logits in (
        with_ties(3, vocab_size, [-INF, -1.5, -0.0, 0.0]),
        with_ties(2, vocab_size, [-INF]),
        with_ties(2, vocab_size, [-3.5, -3.25, -INF]),
        with_ties(3, vocab_size, [-INF, 2.0, INF, NAN]),
        with_ties(3, vocab_size, [2.0, INF, -NAN]),
        np.random.default_rng(0).normal(size=(3, vocab_size)).astype(np.float32),
    ):
        ids, values = OPS["argmax"](torch.from_numpy(logits).to(DEVICE))
        assert ids.tolist() == logits.argmax(axis=1).tolist()
        np.testing.assert_array_equal(values.cpu().numpy(), logits.max(axis=1))


@pytest.mark.parametrize(
    ("vocab_size", "k"), [(1, 1), (7, 0), (7, 9), (300, 257), (4097, 3), (9001, 1000), (1100, 1030)]
)
def test_top_k_orders_by_logit_and_then_by_id(vocab_size, k):
    normal = np.random.default_rng(0).normal(size=(1, vocab_size)).astype(np.float32)
    logits = np.concatenate(
        [
            with_ties(1, vocab_size, [-INF, -1.5, -0.0, 0.0, 2.0, INF]),
            with_ties(1, vocab_size, [-INF]),
            normal,
            normal * np.float32(1e30),
        ]
    )
    ids = OPS["top_k"](torch.from_numpy(logits).to(DEVICE), k)
    assert ids.tolist() == np.argsort(-logits, axis=1, kind="stable")[:, :k].tolist()


def test_whole_vocabularies():
    logits = torch.randn(1, 32_003, device=DEVICE) * 5
    assert torch.equal(OPS["argmax"](logits)[0], reference.argmax(logits)[0])
    assert torch.equal(OPS["top_k"](logits, 50), reference.top_k(logits, 50))
    torch.testing.assert_close(OPS["log_sum_exp"](logits), reference.log_sum_exp(logits), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("vocab_size", [1, 100, 4097])
@pytest.mark.parametrize("offset", [-1e30, -1e4, 0.0, 1e4, 1e30])
def test_log_sum_exp_of_far_logits(vocab_size, offset):
    logits = torch.randn(2, vocab_size, device=DEVICE) + offset
    torch.testing.assert_close(OPS["log_sum_exp"](logits), reference.log_sum_exp(logits), rtol=1e-6, atol=1e-6)


@pytest.mark.filterwarnings("ignore:(divide by zero|invalid value|overflow) encountered:RuntimeWarning")
def test_log_sum_exp_with_masks_and_bad_rows():
    logits = torch.full((8, 9000), -1000.0)
    logits[0] = -INF
    logits[0, 8000] = 0.0
    logits[1] = -INF
    logits[2, 5] = NAN
    logits[3, 8500] = INF
    logits[4, 7], logits[4, 8000] = INF, NAN
    logits[5, :4096] = -INF  # a tile of nothing, whose largest must not count
    logits[6, 3], logits[6, 8000] = INF, 1e30
    logits[7] = 90.0  # sums overflow if the largest is not taken off
    out = OPS["log_sum_exp"](logits.to(DEVICE))
    expected = reference.log_sum_exp(logits)
    torch.testing.assert_close(out.cpu(), expected, equal_nan=True, rtol=1e-6, atol=1e-6)
    assert expected[:2].tolist() == [0.0, -INF]


def test_rows_of_a_wider_matrix_and_one_that_must_be_copied():
    wide = torch.randn(2, 700, device=DEVICE)
    part = wide[:, 100:400]
    assert torch.equal(OPS["argmax"](part)[0], part.argmax(1))
    assert torch.equal(OPS["top_k"](part, 7), reference.top_k(part, 7))
    torch.testing.assert_close(OPS["log_sum_exp"](part), reference.log_sum_exp(part))
    assert torch.equal(OPS["top_k"](wide[:, :2].T, 3), reference.top_k(wide[:, :2].T, 3))


def test_no_rows_give_none():
    logits = torch.empty(0, 5, device=DEVICE)
    assert OPS["argmax"](logits)[0].shape == (0,)
    assert OPS["log_sum_exp"](logits).shape == (0,)
    assert OPS["top_k"](logits, 3).shape == (0, 3)


def test_shapes_are_checked():
    for op in (OPS["argmax"], OPS["log_sum_exp"], lambda logits: OPS["top_k"](logits, 3)):
        with pytest.raises(ShapeError, match="vocab_size"):
            op(torch.zeros(5, device=DEVICE))


def test_tokens_are_those_of_whole_rows():
    """The engine's use of these ops; see test_device_sampler.py for all of it."""
    kinds = [{"top_k": 5}, {"top_p": 0.7, "logprobs": 2}, {"temperature": 0.7}, {"min_p": 0.3}]
    kinds += [*kinds, {"temperature": 0.0}, {"temperature": 0.0, "logit_bias": {3: 9.0}, "frequency_penalty": 1.0}]
    masks = [None] * 4 + [bytes(range(30, 70))] * 5 + [None]
    logits = torch.randn(len(kinds), 300) * 3
    rows = [
        SamplingRow(
            seq_id=i,
            params=SamplingParams(**kind),
            seed=i,
            prompt_token_ids=(1,),
            output_token_ids=(3, 4),
            eos_token_ids=(),
            mask=mask,
        )
        for i, (kind, mask) in enumerate(zip(kinds, masks, strict=True))
    ]
    sampler = DeviceSampler(resolve_kernels(KernelChoice.TRITON, device=DEVICE))
    sampled = sampler.sample(logits.to(DEVICE), rows).sampled
    assert [token.token_id for token in sampled] == [token.token_id for token in Sampler().sample(logits, rows).sampled]
    assert sampler.copied_rows == 0
