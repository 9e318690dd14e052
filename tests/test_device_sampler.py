"""Sampling where little of the logits travels to the host, against the sampler that reads whole rows."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.config import SamplingParams
from headrace.engine import device_sampler, sampler
from headrace.engine.device_sampler import DeviceSampler
from headrace.engine.logits import HostLogits, Largest
from headrace.engine.sampler import Sampler, SamplingRow
from headrace.errors import ShapeError
from headrace.kernels import KernelChoice, Kernels, resolve_kernels

EOS = 3
INF, NAN = float("inf"), float("nan")
REFERENCE = resolve_kernels(KernelChoice.REFERENCE)

any_params = st.fixed_dictionaries(
    {},
    optional={
        "temperature": st.sampled_from([0.0, 1e-3, 0.6, 1.0, 1.7, 50.0]),
        "top_k": st.sampled_from([0, 1, 2, 50, 300, 1024, 1025]),
        "top_p": st.sampled_from([0.05, 0.5, 0.9, 0.999, 1.0]),
        "min_p": st.sampled_from([0.0, 0.02, 0.5, 1.0]),
        "logprobs": st.sampled_from([0, 1, 20]),
        "min_tokens": st.sampled_from([0, 3]),
        "logit_bias": st.just({1: 4.0}),
        "frequency_penalty": st.just(0.5),
    },
)


def make_row(seq_id: int = 0, output: Sequence[int] = (), seed: int = 0, **params) -> SamplingRow:
    return SamplingRow(
        seq_id=seq_id,
        params=SamplingParams(**{"max_tokens": None, **params}),
        seed=seed,
        prompt_token_ids=(1, 2),
        output_token_ids=output,
        eos_token_ids=(EOS,),
    )


def make_logits(num_rows: int, vocab_size: int, seed: int = 0, scale: float = 3.0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(num_rows, vocab_size)).astype(np.float32) * np.float32(scale)


def assert_same(logits: np.ndarray, rows: Sequence[SamplingRow], kernels: Kernels = REFERENCE) -> DeviceSampler:
    """Tokens, ranks and failures are the same; log probabilities nearly."""
    on_device, whole = DeviceSampler(kernels), torch.from_numpy(logits).to(kernels.device)
    result = on_device.sample(whole, rows)
    expected = Sampler().sample(torch.from_numpy(logits), rows)
    assert result.failed == expected.failed
    assert [(t.seq_id, t.token_id) for t in result.sampled] == [(t.seq_id, t.token_id) for t in expected.sampled]
    for token, other in zip(result.sampled, expected.sampled, strict=True):
        assert [(p.token_id, p.rank) for p in token.logprobs] == [(p.token_id, p.rank) for p in other.logprobs]
        for found, wanted in zip(token.logprobs, other.logprobs, strict=True):
            assert found.logprob == pytest.approx(wanted.logprob, abs=3e-6)
    return on_device


@settings(deadline=None, max_examples=150)
@given(
    vocab_size=st.sampled_from([1, 5, 64, 257, 1000, 1500]),
    scale=st.sampled_from([0.0, 0.01, 1.0, 4.0, 1e4]),
    params=st.lists(any_params, min_size=1, max_size=5),
    seed=st.integers(0, 2**64 - 1),
)
def test_tokens_are_those_of_whole_rows(vocab_size, scale, params, seed):
    logits = make_logits(len(params), vocab_size, seed % 2**32, scale)
    rows = [make_row(i, output=(4,) * (seed % 3), seed=seed + i, **each) for i, each in enumerate(params)]
    assert_same(logits, rows)


@pytest.mark.parametrize(
    "params",
    [
        {"top_k": 40},
        {"top_k": 40, "top_p": 0.9, "min_p": 0.05},
        {"top_p": 0.9},
        {"top_p": 0.8, "min_p": 0.1},
        {"min_p": 0.05},
        {"temperature": 0.7},
        {"temperature": 0.0, "logprobs": 5},
        {"top_k": 1024, "logprobs": 20},
    ],
    ids=str,
)
def test_rows_of_a_language_model_stay_on_the_device(params):
    """Logits as far apart as those of a model that has an opinion: few draws fall near an edge."""
    num_rows = 100
    logits = make_logits(num_rows, 2000, seed=7, scale=4.0)
    rows = [make_row(i, seed=i, **params) for i in range(num_rows)]
    assert assert_same(logits, rows).copied_rows <= 6


@pytest.mark.parametrize(
    ("params", "uniform"),
    [({}, 0.5), ({}, 0.25), ({}, 1 - 2.0**-53), ({"top_p": 0.5}, 0.9), ({"top_p": 0.75}, 0.9)],
    ids=str,
)
def test_a_draw_at_an_edge_is_made_on_the_whole_row(params, uniform, monkeypatch):
    """Four tokens of a probability of 1/4: rounding decides, and it must be the host's."""
    monkeypatch.setattr(sampler, "uniform_at", lambda seed, position: uniform)
    assert assert_same(np.zeros((1, 4), np.float32), [make_row(**params)]).copied_rows == 1


@pytest.mark.parametrize("error", [-4e-6, 4e-6])
def test_sums_may_be_off_by_what_float32_is_off(error):
    kernels = replace(REFERENCE, log_sum_exp=lambda logits: REFERENCE.log_sum_exp(logits) + error)
    logits = make_logits(400, 300, seed=3, scale=2.0)
    assert_same(logits, [make_row(i, seed=i, top_p=0.9) for i in range(400)], kernels)


def test_a_wide_nucleus_is_found_on_the_whole_row():
    logits = make_logits(3, 1000, scale=0.1)
    assert assert_same(logits, [make_row(i, seed=i, top_p=0.9) for i in range(3)]).copied_rows == 3
    assert assert_same(logits, [make_row(i, seed=i, min_p=0.1) for i in range(3)]).copied_rows == 3


def mask_of(token_ids: Sequence[int], vocab_size: int) -> bytes:
    bits = np.zeros(-(-vocab_size // 32) * 32, np.uint8)
    bits[list(token_ids)] = 1
    return np.packbits(bits, bitorder="little").tobytes()


def test_rows_that_change_their_logits_stay_on_the_device_but_not_those_that_want_very_many_candidates():
    logits = make_logits(7, 2000, scale=4.0)
    rows = [
        make_row(0, logit_bias={5: 1.0, 1999: 30.0}),
        make_row(1, min_tokens=2, stop_token_ids=[int(logits[1].argmax())], temperature=0.0),
        make_row(2, output=(5, 6), presence_penalty=1.0, temperature=0.5),
        make_row(3, output=(8,), repetition_penalty=1.5, frequency_penalty=2.0, top_k=20, logprobs=2),
        replace(make_row(4, temperature=0.0), mask=mask_of([31, 32, 1999], 2000)),
        replace(make_row(5, top_p=0.9, logit_bias={0: -3.0}), mask=mask_of(range(0, 2000, 7), 2000)),
        make_row(6, top_k=1025),
    ]
    assert assert_same(logits, rows).copied_rows == 1


@settings(deadline=None, max_examples=60)
@given(
    vocab_size=st.sampled_from([1, 5, 33, 257, 1000]),
    params=st.lists(any_params, min_size=1, max_size=5),
    share=st.sampled_from([0.0, 0.002, 0.1, 0.9]),
    seed=st.integers(0, 2**32 - 1),
)
def test_masked_rows_are_those_of_the_host(vocab_size, params, share, seed):
    """Also where nothing is allowed, or all that is was forbidden already."""
    rng = np.random.default_rng(seed)
    logits = make_logits(len(params), vocab_size, seed)
    logits[rng.random(logits.shape) < 0.1] = -INF
    rows = [
        make_row(i, output=(vocab_size - 1,) * (seed % 3), seed=seed + i, repetition_penalty=1.3, **each)
        for i, each in enumerate(params)
    ]
    rows = [
        replace(row, mask=mask_of(np.flatnonzero(rng.random(vocab_size) < share), vocab_size)) if seed & 1 << i else row
        for i, row in enumerate(rows)
    ]
    assert_same(logits, rows)


def test_an_unlikely_token_is_looked_up_where_the_logits_lie():
    """Its rank is among all tokens, and no row is copied for it."""
    logits = make_logits(3, 500, scale=0.01)
    logits[2] = 0
    rows = [
        make_row(0, seed=5, logprobs=2),
        replace(make_row(1, temperature=0.0, logprobs=3), mask=mask_of([int(logits[1].argmin())], 500)),
        make_row(2, seed=5, logprobs=2),
    ]
    assert assert_same(logits, rows).copied_rows == 0


def test_a_bad_row_fails_alone_and_nothing_is_asked_of_it():
    logits = make_logits(5, 300)
    logits[1, 7], logits[2, 8], logits[3] = NAN, INF, -INF
    logits[4, :290] = -INF
    assert_same(logits, [make_row(i, seed=i, top_k=20, temperature=0.8) for i in range(5)])
    assert_same(logits, [make_row(i, seed=i, top_p=0.9) for i in range(5)])
    assert_same(logits, [make_row(i, seed=i) for i in range(5)])


def test_more_rows_than_are_handled_at_once(monkeypatch):
    monkeypatch.setattr(device_sampler, "_MAX_ROWS", 3)
    kinds = [{"top_k": 5}, {"top_p": 0.7}, {}, {"temperature": 0.0}, {"min_p": 0.3}]
    logits = make_logits(11, 400)
    assert_same(logits, [make_row(i, seed=i, **kinds[i % 5]) for i in range(11)])


def test_the_largest_logits_may_be_known_already():
    logits = make_logits(3, 100)
    known = Largest(logits.argmax(1), logits.max(1))
    rows = [make_row(0, temperature=0.0), make_row(1, seed=2), make_row(2, temperature=0.0, logprobs=3)]
    kernels = replace(REFERENCE, argmax=None)
    sampled = DeviceSampler(kernels).sample(torch.from_numpy(logits), rows, known).sampled
    expected = Sampler().sample(torch.from_numpy(logits), rows).sampled
    assert [t.token_id for t in sampled] == [t.token_id for t in expected]


def test_only_whole_rows_are_read_by_the_host(monkeypatch):
    """Rows whose candidates suffice never go through `HostLogits.row`."""
    asked = []
    logits = torch.from_numpy(make_logits(4, 2000))
    monkeypatch.setattr(HostLogits, "row", lambda self, index: asked.append(index) or np.zeros(2000, np.float32))
    rows = [
        make_row(0, seed=1, top_k=5),
        make_row(1, seed=1, top_k=1025),
        make_row(2, temperature=0.0),
        make_row(3, temperature=0.0, logit_bias={1: 1.0}),
    ]
    DeviceSampler(REFERENCE).sample(logits, rows)
    assert asked == [1]


def test_logits_and_rows_must_pair_up():
    with pytest.raises(ShapeError, match="2 sequences"):
        DeviceSampler(REFERENCE).sample(torch.zeros(1, 10), [make_row(0), make_row(1)])
