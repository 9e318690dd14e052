"""Tokens and log probabilities against a plain float64 oracle, transformers' processors and exact distributions."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from headrace.config import SamplingParams
from headrace.engine.draw import draw_token, first_above, largest_tokens
from headrace.engine.logits import Largest, largest_on_device, largest_on_host
from headrace.engine.logprobs import float32_row, prompt_logprobs
from headrace.engine.penalties import TokenCounts
from headrace.engine.plan import StepResult
from headrace.engine.random_stream import uniform_at
from headrace.engine.sampler import Sampler, SamplingRow
from headrace.errors import KernelError, ShapeError

VOCAB_SIZES = (1, 2, 5, 64, 131, 257, 1000, 4099)
EOS = 3


def make_row(seq_id=0, prompt=(), output=(), seed=0, eos=(EOS,), **params) -> SamplingRow:
    return SamplingRow(
        seq_id=seq_id,
        params=SamplingParams(**{"max_tokens": None, **params}),
        seed=seed,
        prompt_token_ids=prompt,
        output_token_ids=output,
        eos_token_ids=eos,
    )


def sample_one(logits, row: SamplingRow) -> int:
    outcome = Sampler().sample(torch.as_tensor(logits, dtype=torch.float32).reshape(1, -1), [row])
    assert outcome.failed == {}
    return outcome.sampled[0].token_id


# The oracle: one token at a time, in Python and float64, in the order the module states.


def oracle_logits(logits, row: SamplingRow) -> list[float]:
    changed = [float(x) for x in logits]
    for token_id, bias in row.params.logit_bias.items():
        changed[token_id] += bias
    if len(row.output_token_ids) < row.params.min_tokens:
        for token_id in {*row.eos_token_ids, *row.params.stop_token_ids}:
            changed[token_id] = -math.inf
    for token_id in {*row.prompt_token_ids, *row.output_token_ids}:
        r = row.params.repetition_penalty
        changed[token_id] = changed[token_id] / r if changed[token_id] > 0 else changed[token_id] * r
    for token_id in set(row.output_token_ids):
        count = list(row.output_token_ids).count(token_id)
        changed[token_id] -= row.params.frequency_penalty * count + row.params.presence_penalty
    return changed


def softmax(logits) -> np.ndarray:
    logits = np.asarray(logits, np.float64)
    weights = np.exp(logits - logits.max())
    return weights / weights.sum()


def oracle_distribution(logits, temperature, top_k, top_p, min_p) -> np.ndarray:
    order = sorted(range(len(logits)), key=lambda t: (-logits[t], t))
    kept = order[:top_k] if top_k > 0 else order
    gaps = (np.asarray(logits, np.float64) - max(logits))[kept] / temperature
    nucleus, mass = [], 0.0
    for token_id, probability in zip(kept, softmax(gaps), strict=True):
        if nucleus and mass >= top_p < 1:
            break
        nucleus.append((token_id, probability))
        mass += probability
    distribution = np.zeros(len(logits))
    for token_id, probability in nucleus:
        if probability >= min_p * nucleus[0][1]:
            distribution[token_id] = probability
    return distribution / distribution.sum()


def tokens_near(logits, uniform, params: SamplingParams, slack=2e-5) -> set[int]:
    """What the oracle draws when the boundary of each rule is moved by more than rounding can move it."""
    steps = (-slack, 0.0, slack)
    top_ps = {min(max(params.top_p + s, 0), 1.0) for s in steps} if params.top_p < 1 else {1.0}
    min_ps = {min(params.min_p * (1 + s), 1.0) for s in steps}
    drawn = set()
    for top_p, min_p in itertools.product(top_ps, min_ps):
        distribution = oracle_distribution(logits, params.temperature, params.top_k, top_p, min_p)
        sums = np.cumsum(distribution)
        drawn |= {min(int(np.searchsorted(sums, uniform + s, "right")), int(sums.argmax())) for s in steps}
    return drawn


PARAMS = {
    "temperature": st.sampled_from([0, 1e-3, 0.5, 1.0, 1.0, 3.0, 1e30]),
    "top_k": st.sampled_from([-1, 0, 0, 1, 2, 7, 50, 10**6]),
    "top_p": st.sampled_from([1.0, 1.0, 1e-12, 0.3, 0.9, 0.9999]),
    "min_p": st.sampled_from([0.0, 0.0, 0.05, 0.5, 1.0]),
    "repetition_penalty": st.sampled_from([1.0, 1.3, 0.7, 1e-3]),
    "presence_penalty": st.sampled_from([0.0, 0.8, -2.0]),
    "frequency_penalty": st.sampled_from([0.0, 1.1, -0.4]),
    "min_tokens": st.sampled_from([0, 0, 9]),
}


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_agrees_with_the_oracle(data) -> None:
    vocab_size = data.draw(st.sampled_from(VOCAB_SIZES))
    seed = data.draw(st.integers(0, 2**63 - 1))
    rng = np.random.default_rng(seed)
    # Eighths in float32 are exact and make ties common.
    logits = np.round(rng.normal(size=vocab_size) * data.draw(st.sampled_from([0.0, 0.5, 3.0])) * 8) / 8
    tokens = st.lists(st.integers(0, vocab_size - 1), max_size=8)
    bias = data.draw(st.dictionaries(st.integers(0, vocab_size - 1), st.sampled_from([-5.0, 0.25, 4.0]), max_size=3))
    row = make_row(
        prompt=data.draw(tokens),
        output=data.draw(tokens),
        seed=seed,
        eos=() if vocab_size < 5 else (EOS,),
        logit_bias=bias,
        **{name: data.draw(values) for name, values in PARAMS.items()},
    )
    expected = np.array(oracle_logits(logits, row), np.float32)
    drawn = sample_one(logits, row)
    if row.params.is_greedy:
        assert drawn == int(expected.argmax())
    else:
        assert drawn in tokens_near(expected.tolist(), uniform_at(seed, len(row.output_token_ids)), row.params)


def assert_draws(distribution: np.ndarray, logits, **params) -> None:
    """Draw at the middle of every token's share of the cumulative distribution."""
    upper = np.cumsum(distribution)
    wide = np.flatnonzero(distribution > 1e-4)
    assert distribution[wide].sum() > 0.5
    settings_ = SamplingParams(**params)
    row = np.asarray(logits, np.float32)
    drawn = [draw_token(row, settings_, float(upper[t] - distribution[t] / 2)) for t in wide]
    assert drawn == wide.tolist()


@pytest.mark.parametrize("temperature", [0.6, 1.0, 2.5])
@pytest.mark.parametrize("top_k", [0, 1, 10, 2000])
@pytest.mark.parametrize("top_p", [1.0, 0.05, 0.8])
@pytest.mark.parametrize("min_p", [0.0, 0.1, 1.0])
def test_keeps_what_transformers_keeps(temperature, top_k, top_p, min_p) -> None:
    generator = torch.Generator().manual_seed(5)
    logits = torch.randn(1, 900, generator=generator, dtype=torch.float64).float() * 2
    scores = TemperatureLogitsWarper(temperature)(None, logits.double())
    if top_k:
        scores = TopKLogitsWarper(top_k)(None, scores)
    scores = MinPLogitsWarper(min_p)(None, TopPLogitsWarper(top_p)(None, scores))
    expected = scores.softmax(-1)[0].numpy()
    assert_draws(expected, logits[0].numpy(), temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)


def test_changes_logits_as_transformers_does() -> None:
    generator = torch.Generator().manual_seed(6)
    logits = torch.randn(1, 50, generator=generator) * 3
    prompt, output, bias = [4, 9, 9, 30], [30, 7, 7], {11: 2.5, 30: -1.0}
    tokens = torch.tensor([prompt + output])
    scores = SequenceBiasLogitsProcessor({(t,): b for t, b in bias.items()})(tokens, logits.clone())
    scores = MinNewTokensLengthLogitsProcessor(len(prompt), 5, [EOS, 20])(tokens, scores)
    scores = RepetitionPenaltyLogitsProcessor(1.4)(tokens, scores)
    distribution = scores.double().softmax(-1)[0].numpy()
    row = make_row(
        prompt=prompt, output=output, repetition_penalty=1.4, logit_bias=bias, min_tokens=5, stop_token_ids=[20]
    )
    changed = Sampler()
    changed.sample(logits, [row])  # fills the counts
    assert_draws(distribution, changed.changed(logits[0].numpy(), row))
    assert distribution[[EOS, 20]].tolist() == [0, 0]


@pytest.mark.parametrize(
    ("vocab_size", "params"),
    [
        (40, {"temperature": 1.3}),
        (40, {"temperature": 0.9, "top_k": 12, "top_p": 0.9}),
        (700, {"top_p": 0.7, "temperature": 2.0}),
        (40, {"min_p": 0.2}),
    ],
)
def test_draws_follow_the_exact_distribution(vocab_size, params) -> None:
    """Chi-square of 6000 positions of one stream: mean dof, standard deviation sqrt(2 dof)."""
    logits = np.random.default_rng(1).normal(size=vocab_size).astype(np.float32)
    chosen = SamplingParams(**params)
    num_draws = 6000
    drawn = np.array([draw_token(logits, chosen, uniform_at(17, i)) for i in range(num_draws)])
    p = chosen
    expected = num_draws * oracle_distribution(logits.tolist(), p.temperature, p.top_k, p.top_p, p.min_p)
    counts = np.bincount(drawn, minlength=vocab_size)
    kept = expected > 0
    assert counts[~kept].sum() == 0
    chi_square = float(((counts - expected)[kept] ** 2 / expected[kept]).sum())
    dof = int(kept.sum()) - 1
    assert abs(chi_square - dof) < 4 * math.sqrt(2 * dof)


MIXED = [
    {},
    {"temperature": 0},
    {"top_p": 0.9, "top_k": 50},
    {"top_p": 0.95, "temperature": 2.0},
    {"min_p": 0.02, "presence_penalty": 1.0},
    {"repetition_penalty": 1.2, "logprobs": 3},
]


def test_a_row_never_depends_on_its_batch() -> None:
    """1000 positions, alone and among random others at a random place, by two samplers that saw different batches."""
    rng = np.random.default_rng(0)
    logits = torch.from_numpy(rng.normal(size=(1000, 600)).astype(np.float32) * 2)
    alone, shared = Sampler(), Sampler()
    output: list[int] = []
    for position in range(1000):
        row = make_row(7, prompt=(1, 2), output=output, seed=99, **MIXED[position % len(MIXED)])
        others = [
            make_row(100 + i, prompt=(5,), output=[6] * i, seed=i, **MIXED[int(rng.integers(len(MIXED)))])
            for i in range(int(rng.integers(4)))
        ]
        place = int(rng.integers(len(others) + 1))
        rows = [*others[:place], row, *others[place:]]
        batch = logits[rng.integers(1000, size=len(rows))]
        batch[place] = logits[position]
        by_itself = alone.sample(logits[position : position + 1], [row]).sampled[0]
        assert shared.sample(batch, rows).sampled[place] == by_itself
        output.append(by_itself.token_id)
    assert len(set(output)) > 200


def test_uniforms_are_pinned() -> None:
    """A changed stream changes what users' seeds give."""
    assert [uniform_at(0, 0), uniform_at(0, 1), uniform_at(42, 7)] == [
        0.011546754286331562,
        0.5023796042735054,
        0.4074136540795371,
    ]
    assert uniform_at(-1, 5) == uniform_at(2**64 - 1, 5)


def test_uniforms_are_uniform_and_streams_differ() -> None:
    streams = np.array([[uniform_at(seed, i) for i in range(2000)] for seed in (1, 2)])
    assert streams.min() >= 0
    assert streams.max() < 1
    counts = np.stack([np.histogram(stream, bins=20, range=(0, 1))[0] for stream in streams])
    assert (((counts - 100) ** 2 / 100).sum(axis=1) < 19 + 4 * math.sqrt(38)).all()
    assert abs(np.corrcoef(streams)[0, 1]) < 0.1


@pytest.mark.parametrize("vocab_size", VOCAB_SIZES)
@pytest.mark.parametrize("k", [0, 1, 2, 31, 256, 5000])
def test_largest_tokens_breaks_ties_by_id(vocab_size, k) -> None:
    rng = np.random.default_rng(k)
    for logits in (rng.integers(0, 9, vocab_size), np.zeros(vocab_size), np.full(vocab_size, -np.inf)):
        order = sorted(range(vocab_size), key=lambda t: (-logits[t], t))
        assert largest_tokens(logits.astype(np.float32), k).tolist() == order[:k]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("params", [{"temperature": 0}, {"top_k": 1}, {"top_p": 1e-30}, {"temperature": 1e-5}])
def test_equals_are_broken_by_the_smallest_id(dtype, params) -> None:
    logits = torch.zeros(1, 500, dtype=dtype)
    logits[0, 400] = logits[0, 123] = 2.0
    expected = {123, 400} if params == {"temperature": 1e-5} else {123}
    drawn = {Sampler().sample(logits, [make_row(seed=s, **params)]).sampled[0].token_id for s in range(20)}
    assert drawn == expected


@pytest.mark.parametrize("params", [{}, {"temperature": 0}, {"top_p": 0.5}, {"top_k": 3, "min_p": 1.0}, {"min_p": 0.3}])
def test_vocabulary_of_one(params) -> None:
    assert sample_one([-4.0], make_row(eos=(), logprobs=5, **params)) == 0


def test_min_p_one_keeps_the_most_likely_and_its_equals() -> None:
    drawn = {sample_one([1.0, 5.0, 5.0, 4.99], make_row(seed=s, min_p=1.0)) for s in range(30)}
    assert drawn == {1, 2}


@pytest.mark.parametrize("temperature", [0, 1e-5, 1.0, 1e308])
@pytest.mark.parametrize("params", [{}, {"top_k": 2}, {"top_p": 0.9}, {"min_p": 0.1}])
def test_extreme_logits_stay_finite(temperature, params) -> None:
    """-inf / inf and max - (-max) once met here: neither NaN nor a warning may come of it."""
    logits = np.full(300, -3e38)
    logits[:5] = [1e30, -math.inf, 1e30, 3e38, -1e30]
    row = make_row(temperature=temperature, logprobs=2, **params)
    outcome = Sampler().sample(torch.tensor(logits, dtype=torch.float32)[None], [row])
    (sampled,) = outcome.sampled
    assert sampled.token_id == 3 or temperature == 1e308
    assert sampled.token_id != 1
    assert not any(math.isnan(entry.logprob) for entry in sampled.logprobs)


@pytest.mark.parametrize("params", [{}, {"top_k": 400}, {"top_p": 0.999}, {"min_p": 1e-9}, {"temperature": 1e30}])
def test_forbidden_tokens_are_never_drawn(params) -> None:
    logits = np.full(600, -math.inf, np.float32)
    logits[[10, 500]] = 1.0
    chosen = SamplingParams(**params)
    uniforms = [0.0, 5e-324, 0.25, 0.5, 0.75, 1 - 2.0**-53]
    assert {draw_token(logits, chosen, u) for u in uniforms} == {10, 500}


def test_a_target_rounded_up_to_the_whole_sum_gives_the_last_token_of_any_weight() -> None:
    sums = np.array([0.0, 1.0, 3.0, 3.0])
    assert [first_above(sums, target) for target in (0.0, 0.5, 1.0, 2.9, 3.0, 3.1)] == [1, 1, 2, 2, 2, 2]


def test_zeros_of_either_sign_are_equal() -> None:
    """-0.0 less 0.0 is -0.0, whose sign bit once put the token behind all others and out of the nucleus."""
    for first, second in ((0.0, -0.0), (-0.0, 0.0)):
        logits = np.where(np.arange(1000) % 3 == 0, first, second)
        assert_draws(oracle_distribution(logits, 1.0, 0, 0.3, 0.0), logits, top_p=0.3)


def test_greedy_applies_penalties() -> None:
    row = make_row(temperature=0, output=[1, 1, 2], presence_penalty=0.5, frequency_penalty=0.3, eos=())
    assert sample_one([0.0, 1.0, 0.75], row) == 0
    assert sample_one([-0.1, 1.0, 0.75], row) == 2


def test_min_tokens_forbids_end_tokens_until_reached() -> None:
    logits = [0.0, 1.0, 2.0, 9.0, 8.0]
    for ignore_eos in (False, True):
        params = {"temperature": 0, "min_tokens": 2, "stop_token_ids": [4], "ignore_eos": ignore_eos}
        assert sample_one(logits, make_row(output=[0], **params)) == 2
        assert sample_one(logits, make_row(output=[0, 0], **params)) == EOS
    assert sample_one(logits, make_row(temperature=0, min_tokens=1, eos=(EOS, 10**6))) == 4


def test_bad_rows_fail_alone() -> None:
    logits = torch.zeros(6, 8)
    logits[0, 3] = math.nan
    logits[1, 2] = math.inf
    logits[2] = -math.inf
    logits[3, :7] = -math.inf
    rows = [make_row(i, **({"temperature": 0} if i % 2 else {})) for i in range(3)]
    rows.append(make_row(3, temperature=0, min_tokens=1, stop_token_ids=[7]))
    rows.append(make_row(4, temperature=0))
    rows.append(make_row(5, output=[1], repetition_penalty=1e-300, logit_bias={1: 5}))
    outcome = Sampler().sample(logits, rows)
    assert [token.seq_id for token in outcome.sampled] == [4]
    assert outcome.failed == {
        0: "no token for sequence 0: the logits hold NaN",
        1: "no token for sequence 1: the logits hold +inf",
        2: "no token for sequence 2: every token is forbidden: all logits are -inf",
        3: "no token for sequence 3: every token is forbidden: all logits are -inf"
        " after logit_bias, min_tokens, penalties and structured_outputs",
        5: "no token for sequence 5: the logits hold +inf"
        " after logit_bias, min_tokens, penalties and structured_outputs",
    }


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_bad_logit_is_not_hidden_by_being_forbidden(bad) -> None:
    logits = torch.zeros(1, 8)
    logits[0, EOS] = bad
    assert Sampler().sample(logits, [make_row(min_tokens=4)]).sampled == ()


def test_never_writes_the_logits() -> None:
    logits = torch.randn(6, 300, generator=torch.Generator().manual_seed(0))
    before = logits.clone()
    rows = [make_row(i, output=[1], logit_bias={1: 9}, min_tokens=3, **p) for i, p in enumerate(MIXED)]
    rows[5] = make_row(5, top_p=0.9, temperature=2.0)
    Sampler().sample(logits, rows)
    assert torch.equal(logits, before)


def test_accepts_views_and_gradients() -> None:
    wide = torch.randn(2, 80, generator=torch.Generator().manual_seed(0), requires_grad=True)
    rows = [make_row(0, top_k=5), make_row(1, top_p=0.5, presence_penalty=1, output=[1])]
    expected = Sampler().sample(wide.detach()[:, ::2].contiguous(), rows)
    assert Sampler().sample(wide[:, ::2], rows) == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_largest_is_the_same_wherever_it_is_looked_for(dtype) -> None:
    logits = torch.randint(0, 50, (40, 3000), generator=torch.Generator().manual_seed(0)).to(dtype)
    logits[1, 7] = math.nan
    logits[2, 8:10] = math.inf
    logits[3] = -math.inf
    on_host, on_device = largest_on_host(map(float32_row, logits)), largest_on_device(logits)
    assert [i for i, _ in on_host] == [i for i, _ in on_device]
    np.testing.assert_array_equal([x for _, x in on_host], [x for _, x in on_device])


def test_the_largest_may_be_known_already() -> None:
    logits = torch.randn(7, 300, generator=torch.Generator().manual_seed(0))
    logits[6, 5] = math.nan
    rows = [make_row(i, output=[1], **p) for i, p in enumerate(MIXED[:6])] + [make_row(6)]
    largest = Largest(logits.numpy().argmax(axis=1), logits.numpy().max(axis=1))
    outcome = Sampler().sample(logits, rows, largest)
    assert outcome == Sampler().sample(logits, rows)
    assert outcome.failed.keys() == {6}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gpu_gives_the_same_tokens(dtype) -> None:
    logits = (torch.randn(6, 3000, generator=torch.Generator().manual_seed(0)) * 3).to(dtype)
    rows = [make_row(i, prompt=[1], output=[2], seed=i, **params) for i, params in enumerate(MIXED)]
    assert Sampler().sample(logits.cuda(), rows) == Sampler().sample(logits, rows)


def test_empty_batch() -> None:
    assert Sampler().sample(torch.empty(0, 9), []) == StepResult(sampled=(), failed={})


@pytest.mark.parametrize("logits", [torch.zeros(2, 9), torch.zeros(9), torch.zeros(1, 0), torch.zeros(1, 9).long()])
def test_refuses_shapes_that_do_not_fit(logits) -> None:
    with pytest.raises(ShapeError):
        Sampler().sample(logits, [make_row()])


# Log probabilities.


def check_entries(entries, logits: np.ndarray, token_id: int, num_top: int) -> None:
    exact = np.log(np.maximum(softmax(logits), 1e-300))
    order = sorted(range(len(logits)), key=lambda t: (-logits[t], t))[:num_top]
    assert [entry.token_id for entry in entries] == [token_id, *(t for t in order if t != token_id)]
    assert [entry.rank for entry in entries] == [1 + sum(logits > logits[entry.token_id]) for entry in entries]
    np.testing.assert_allclose([e.logprob for e in entries], exact[[e.token_id for e in entries]], atol=1e-5)


@pytest.mark.parametrize("num_top", [0, 1, 5, 20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logprobs_are_of_the_raw_logits(num_top, dtype) -> None:
    logits = (torch.randn(8, 3000, generator=torch.Generator().manual_seed(2)) * 3).to(dtype)
    rows = [
        make_row(i, seed=i, output=[1], logprobs=num_top, logit_bias={5: 50}, presence_penalty=1, temperature=0.3)
        for i in range(8)
    ]
    for row, sampled in zip(logits, Sampler().sample(logits, rows).sampled, strict=True):
        assert sampled.token_id == 5
        check_entries(sampled.logprobs, row.double().numpy(), 5, num_top)


def test_logprobs_only_where_asked_for() -> None:
    logits = torch.randn(2, 30, generator=torch.Generator().manual_seed(3))
    outcome = Sampler().sample(logits, [make_row(0), make_row(1, logprobs=0)])
    assert [len(sampled.logprobs) for sampled in outcome.sampled] == [0, 1]


@pytest.mark.parametrize("num_top", [0, 3, 20])
def test_prompt_logprobs(num_top) -> None:
    logits = torch.randn(6, 700, generator=torch.Generator().manual_seed(4))
    targets = [0, 699, 5, int(logits[3].argmax()), 17, 17]
    result = prompt_logprobs(logits, targets, num_top)
    for row, target, entries in zip(logits, targets, result, strict=True):
        check_entries(entries, row.double().numpy(), target, num_top)


def test_float32_row_reads_every_bfloat16() -> None:
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    np.testing.assert_array_equal(float32_row(every), every.float().numpy())
    np.testing.assert_array_equal(float32_row(every[::3]), every[::3].float().numpy())


def test_prompt_logprobs_of_an_impossible_token() -> None:
    ((entry,),) = prompt_logprobs(torch.tensor([[0.0, -math.inf]]), [1], 0)
    assert (entry.logprob, entry.rank) == (-math.inf, 2)


def test_prompt_logprobs_refuses_bad_rows_and_shapes() -> None:
    logits = torch.zeros(2, 5)
    with pytest.raises(ShapeError):
        prompt_logprobs(logits, [1], 0)
    logits[1, 1] = math.nan
    with pytest.raises(KernelError, match=r"row 1 .*NaN"):
        prompt_logprobs(logits, [1, 1], 0)


# Token counts.


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 9), max_size=20), st.lists(st.integers(0, 9), max_size=20), st.booleans())
def test_counts_of_a_growing_output(prompt, appended, counts_prompt) -> None:
    output: list[int] = []
    counts = TokenCounts(prompt, output, counts_prompt)
    for token_id in [None, *appended]:
        if token_id is not None:
            output.append(token_id)
        token_ids, occurrences = counts.read()
        expected = {t: output.count(t) for t in {*output, *(prompt if counts_prompt else ())}}
        assert dict(zip(token_ids.tolist(), occurrences.tolist(), strict=True)) == expected
        assert len(token_ids) == len(expected)


def test_counts_start_again_for_another_sequence() -> None:
    """Same seq_id, other lists or a shorter output: what was counted before must not be used."""
    sampler = Sampler()
    params = {"temperature": 0, "presence_penalty": 2.0, "eos": ()}
    logits = torch.tensor([[1.0, 0.5, 0.0]])
    output = [0, 1]
    assert sampler.sample(logits, [make_row(output=output, **params)]).sampled[0].token_id == 2
    del output[1:]
    assert sampler.sample(logits, [make_row(output=output, **params)]).sampled[0].token_id == 1
    assert sampler.sample(logits, [make_row(output=[2], **params)]).sampled[0].token_id == 0
    assert sampler.sample(logits, [make_row(output=[], temperature=0)]).sampled[0].token_id == 0
    assert sampler._counts == {}
