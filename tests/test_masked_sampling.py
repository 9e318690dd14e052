"""Rows whose tokens are masked: as if the logits of all others had been -inf, for every sampler."""

from dataclasses import replace

import numpy as np
import pytest
import test_device_sampler
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sharded_ranks import DEVICE, PARAMS, VOCAB_SIZES, Ranks, assert_same, make_row

from headrace.config import SamplingParams
from headrace.engine.draw import largest_tokens
from headrace.engine.sampler import Sampler, SamplingRow

MANY = 40


def mask_of(allowed: np.ndarray) -> bytes:
    """As the words of `StepPlan.masks`, spelled out: bit i of little-endian word j is that of token 32 j + i."""
    words = [0] * -(-len(allowed) // 32)
    for token_id in np.flatnonzero(allowed).tolist():
        words[token_id // 32] |= 1 << token_id % 32
    return b"".join(word.to_bytes(4, "little") for word in words)


@st.composite
def masked_rows(draw):
    vocab_size = draw(st.sampled_from(VOCAB_SIZES))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    num_rows = draw(st.integers(1, 4))
    logits = (rng.normal(size=(num_rows, vocab_size)) * draw(st.sampled_from([0.0, 1.0, 8.0]))).astype(np.float32)
    rows, allowed = [], np.ones(logits.shape, bool)
    for index in range(num_rows):
        params = draw(st.fixed_dictionaries({}, optional=PARAMS))
        row = make_row(index, prompt=(1, 2), output=[0] * draw(st.integers(0, 2)), seed=index, **params)
        # Few tokens, in one place or in many, or nearly all; the last row may have no mask.
        share = draw(st.sampled_from([0.0, 0.003, 0.1, 0.99, None]))
        if share is not None:
            allowed[index] = rng.random(vocab_size) < share
            if draw(st.booleans()):
                allowed[index, rng.integers(vocab_size)] = True
            row = replace(row, mask=mask_of(allowed[index]))
        rows.append(row)
    return logits, rows, allowed


@given(masked_rows())
@settings(max_examples=80, deadline=None)
def test_a_mask_comes_before_everything(case):
    logits, rows, allowed = case
    found = Sampler().sample(torch.from_numpy(logits), rows)
    # A row of -inf is told of as raw, and log probabilities are of raw logits: these differ, and are left out.
    plain = [replace(row, mask=None, params=replace(row.params, logprobs=None)) for row in rows]
    expected = Sampler().sample(torch.from_numpy(np.where(allowed, logits, np.float32(-np.inf))), plain)
    assert [(t.seq_id, t.token_id) for t in found.sampled] == [(t.seq_id, t.token_id) for t in expected.sampled]
    assert found.failed.keys() == expected.failed.keys()
    for token in found.sampled:
        assert allowed[token.seq_id, token.token_id]


@given(masked_rows(), st.sampled_from([2, 3, 4]), st.sampled_from([None, DEVICE]))
@settings(max_examples=60, deadline=None)
def test_ranks_agree_with_one_process(case, world_size, kernels):
    logits, rows, _ = case
    ranks = Ranks(world_size, logits.shape[1], kernels)
    expected = Sampler().sample(torch.from_numpy(logits), rows)
    assert_same(ranks.sample(logits, rows), expected)


@given(masked_rows())
@settings(max_examples=30, deadline=None)
def test_a_device_agrees_with_the_host(case):
    logits, rows, _ = case
    test_device_sampler.assert_same(logits, rows)


@pytest.mark.parametrize(
    "params",
    [{"temperature": 0}, {"top_k": 20}, {"top_p": 0.9}, {"min_p": 0.1}, {}, {"temperature": 0, "logprobs": 2}],
    ids=str,
)
@pytest.mark.parametrize("kernels", [None, DEVICE], ids=["host", "device"])
def test_rows_of_few_tokens_are_not_gathered(params, kernels):
    """The candidates that are allowed are all there are, on the one rank that has them."""
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(MANY, 4099)).astype(np.float32)
    rows = []
    for index in range(MANY):
        allowed = np.zeros(4099, bool)
        allowed[rng.integers(4099, size=3)] = True
        allowed[logits[index].argmax()] |= "logprobs" in params
        rows.append(replace(make_row(index, seed=index, **params), mask=mask_of(allowed)))
    ranks = Ranks(2, 4099, kernels)
    assert_same(ranks.sample(logits, rows), Sampler().sample(torch.from_numpy(logits), rows))
    assert ranks.fallback_rows == 0


def test_a_masked_row_is_not_taken_for_a_plain_one():
    row = SamplingRow(
        seq_id=0,
        params=SamplingParams(temperature=0),
        seed=0,
        prompt_token_ids=(),
        output_token_ids=[],
        mask=b"\1\0\0\0",
    )
    assert row.changes_logits
    assert not row.takes_largest
    assert replace(row, mask=None).takes_largest


@given(st.integers(1, 300), st.integers(0, 400), st.integers(0, 2**32), st.sampled_from([0.0, 0.02, 0.5, 1.0]))
@settings(max_examples=150, deadline=None)
def test_largest_tokens_of_rows_that_are_mostly_forbidden(vocab_size, k, seed, share):
    rng = np.random.default_rng(seed)
    logits = np.where(rng.random(vocab_size) < share, rng.integers(0, 9, vocab_size), -np.inf).astype(np.float32)
    expected = sorted(range(vocab_size), key=lambda i: (-logits[i], i))[:k]
    assert largest_tokens(logits, k).tolist() == expected
