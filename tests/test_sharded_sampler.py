"""Sampling on sharded logits, ranks in threads, against the sampler of one process on whole rows."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sharded_ranks import DEVICE, EOS, PARAMS, PLAIN, VOCAB_SIZES, Ranks, assert_same, make_row, record_of
from thread_group import ThreadGroup, on_ranks

from headrace.config import SamplingParams
from headrace.costs.candidates import (
    LOGPROB_CANDIDATES,
    MAX_TOP_K_CANDIDATES,
    NUCLEUS_CANDIDATES,
    RowRecord,
    candidates_payload_bytes,
    draws_payload_bytes,
    row_record,
)
from headrace.costs.sharding import shard_vocabulary, vocabulary_shard_sizes
from headrace.costs.sites import Site
from headrace.engine.candidates import NO_TOKEN, Candidates, read_shares, write_candidates_
from headrace.engine.device_shard import DeviceShard
from headrace.engine.host_shard import HostShard
from headrace.engine.logprobs import prompt_logprobs
from headrace.engine.sampler import Sampler, SamplingRow
from headrace.engine.shard import RecordedRows

WHERE = pytest.mark.parametrize("kernels", [None, DEVICE], ids=["host", "device"])
"""Where shards are read."""


@st.composite
def steps(draw) -> tuple[int, np.ndarray, list[SamplingRow]]:
    """World size, logits with ties and infinities, and rows of every kind."""
    world_size, vocab_size = draw(st.integers(1, 5)), draw(st.sampled_from(VOCAB_SIZES))
    seed = draw(st.integers(0, 2**32))
    rng = np.random.default_rng(seed)
    num_rows = draw(st.integers(1, 4))
    scale = draw(st.sampled_from([0.0, 0.5, 3.0]))
    logits = (np.round(rng.normal(size=(num_rows, vocab_size)) * scale * 8) / 8).astype(np.float32)
    logits += np.float32(draw(st.sampled_from([0.0, 0.0, 1e4, -1e4])))
    tokens = st.lists(st.integers(0, vocab_size - 1), max_size=6)
    biases = st.dictionaries(st.integers(0, vocab_size - 1), st.sampled_from([-5.0, 0.25, 100.0]), max_size=3)
    rows = []
    for i in range(num_rows):
        kind = draw(st.sampled_from(["plain", "any", "any", "any"]))
        params = PLAIN if kind == "plain" else {name: draw(values) for name, values in PARAMS.items()}
        bias = draw(st.one_of(st.just({}), biases)) if kind == "any" else {}
        rows.append(make_row(i, prompt=draw(tokens), output=draw(tokens), seed=seed + i, logit_bias=bias, **params))
        damage = draw(st.sampled_from(["none"] * 6 + ["half", "nan", "inf", "all", "one", "nan and inf"]))
        places = rng.integers(0, vocab_size, size=2)
        if damage == "half":
            logits[i, rng.random(vocab_size) < 0.5] = -np.inf
        elif damage == "all":
            logits[i] = -np.inf
        elif damage == "one":
            logits[i, np.arange(vocab_size) != places[0]] = -np.inf
        if "nan" in damage:
            logits[i, places[0]] = np.nan
        if "inf" in damage:
            logits[i, places[1]] = np.inf
    return world_size, logits, rows


@settings(max_examples=300, deadline=None)
@given(steps(), st.booleans(), st.sampled_from([None, DEVICE]))
def test_agrees_with_one_process(step, knows_largest, kernels) -> None:
    world_size, logits, rows = step
    before = logits.copy()
    expected = Sampler().sample(torch.from_numpy(logits), rows)
    ranks = Ranks(world_size, logits.shape[1], kernels)
    assert_same(ranks.sample(logits, rows, knows_largest=knows_largest), expected)
    np.testing.assert_array_equal(logits, before)
    # What was exchanged is what the costs say, on every rank.
    records = [record_of(row, logits.shape[1], world_size) for row in rows]
    draws = draws_payload_bytes(records)
    assert ranks.payload_bytes(Site.CANDIDATES) == [candidates_payload_bytes(records) + draws] * world_size
    assert ranks.count(Site.CANDIDATES) == 1 + (draws > 0)
    sizes = vocabulary_shard_sizes(logits.shape[1], world_size)
    assert ranks.payload_bytes(Site.LOGITS) == [4 * ranks.fallback_rows * size for size in sizes]


@WHERE
@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 0.7, "top_k": 40},
        {"temperature": 1.3, "top_k": 40, "top_p": 0.8, "min_p": 0.02},
        {"temperature": 0.8, "top_p": 0.95},
        {"temperature": 1.0, "min_p": 0.05},
        {"temperature": 1.0},
        {"temperature": 1.7, "repetition_penalty": 1.2, "logit_bias": {5: 3.0}},
    ],
    ids=str,
)
def test_a_stream_of_draws_is_that_of_one_process(world_size, params, kernels) -> None:
    """Outputs grow by what was drawn, over rows that are like a language model's: few likely tokens, a long tail."""
    vocab_size = 3001
    rng = np.random.default_rng(7)
    prompt, outputs = [1, 2, 3], [[], []]
    rows = [[make_row(i, prompt=prompt, output=output, seed=50 + i, **params) for i in range(3)] for output in outputs]
    ranks, one = Ranks(world_size, vocab_size, kernels), Sampler()
    for _ in range(40):
        logits = (rng.standard_t(3, size=(3, vocab_size)) * 2).astype(np.float32)
        expected = one.sample(torch.from_numpy(logits), rows[1])
        assert_same(ranks.sample(logits, rows[0]), expected)
        for output in outputs:
            output.append(expected.sampled[0].token_id)
    assert len(set(outputs[0])) > 5


@WHERE
def test_plain_greedy_rows_are_one_exchange_of_ids_and_logits(kernels) -> None:
    logits = np.random.default_rng(0).normal(size=(7, 500)).astype(np.float32)
    ranks = Ranks(3, 500, kernels)
    outcome = ranks.sample(logits, [make_row(i, temperature=0) for i in range(7)], knows_largest=True)
    assert [token.token_id for token in outcome.sampled] == logits.argmax(1).tolist()
    assert ranks.payload_bytes(Site.CANDIDATES) == [7 * 8] * 3
    assert (ranks.count(Site.CANDIDATES), ranks.count(Site.LOGITS)) == (1, 0)


@WHERE
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("token_id", [0, 40, 99])
@pytest.mark.parametrize("params", [{"temperature": 0}, {}, {"top_p": 0.5}, {"min_p": 0.1, "logprobs": 2}], ids=str)
def test_a_row_that_is_not_finite_fails_alone_whichever_shard_it_is_in(bad, token_id, params, kernels) -> None:
    logits = np.random.default_rng(0).normal(size=(3, 100)).astype(np.float32)
    logits[1, token_id] = bad
    rows = [make_row(i, **params) for i in range(3)]
    outcome = Ranks(3, 100, kernels).sample(logits, rows)
    assert outcome.failed == Sampler().sample(torch.from_numpy(logits), rows).failed
    assert set(outcome.failed) == {1}
    assert [token.seq_id for token in outcome.sampled] == [0, 2]


@WHERE
def test_rows_that_bias_and_penalties_spoil_fail_alone(kernels) -> None:
    """A penalty may make +inf of a logit, and min_tokens may forbid the only token there is."""
    logits = np.full((3, 64), -np.inf, np.float32)
    logits[:, EOS] = 3e38
    logits[2, 40] = 1.0
    rows = [
        make_row(0, output=[EOS], repetition_penalty=1e-3),
        make_row(1, min_tokens=5),
        make_row(2, min_tokens=5),
    ]
    found = Ranks(2, 64, kernels).sample(logits, rows)
    assert_same(found, Sampler().sample(torch.from_numpy(logits), rows))
    assert set(found.failed) == {0, 1}
    assert all("after logit_bias" in reason for reason in found.failed.values())


@pytest.mark.parametrize("knows_largest", [False, True])
def test_a_device_is_waited_for_once_a_step(knows_largest) -> None:
    """Rows of every kind, 40 of one: more than are handled at once. One of no kind that is gathered."""
    kinds = [{}] * 40 + [{"temperature": 0}, {"top_k": 9}, {"top_p": 0.5, "logprobs": 1}, {"min_p": 0.2}]
    kinds += [{"temperature": 0, "logprobs": 2}, {"repetition_penalty": 1.3, "top_k": 3}, {"logit_bias": {5: 1.0}}]
    kinds += [{"temperature": 0, "min_tokens": 3}, {"presence_penalty": 0.1, "top_p": 0.7, "logprobs": 20}]
    logits = np.random.default_rng(5).normal(size=(len(kinds), 700)).astype(np.float32) * 8
    rows = [make_row(i, prompt=(1,), output=(2, 2), seed=i, **kind) for i, kind in enumerate(kinds)]
    rows[-1] = replace(rows[-1], mask=b"\xff" * 88)
    ranks = Ranks(3, 700, DEVICE)
    found = ranks.sample(logits, rows, knows_largest=knows_largest, counts_waits=True)
    assert_same(found, Sampler().sample(torch.from_numpy(logits), rows))
    assert ranks.fallback_rows == 0
    plain = [make_row(i, temperature=0) for i in range(3)]
    ranks.sample(logits[:3], plain, knows_largest=knows_largest, counts_waits=True)


def test_a_draw_that_no_rank_makes_is_made_from_the_whole_row(monkeypatch) -> None:
    """As where ranks that round differently each take another one for the owner."""
    monkeypatch.setattr(HostShard, "_own_draw", lambda *_: NO_TOKEN)
    logits = np.random.default_rng(1).normal(size=(2, 90)).astype(np.float32)
    rows = [make_row(0, seed=3), make_row(1, temperature=0)]
    ranks = Ranks(3, 90)
    assert_same(ranks.sample(logits, rows), Sampler().sample(torch.from_numpy(logits), rows))
    assert ranks.fallback_rows == 1


FLAT = np.random.default_rng(2).normal(size=(1, 4000)).astype(np.float32) / 100
PEAKED = -np.arange(4000, dtype=np.float32)[None, ::-1].copy() / 4


@WHERE
@pytest.mark.parametrize(
    ("logits", "params", "gathered"),
    [
        (FLAT, {"top_p": 0.9}, 1),
        (PEAKED, {"top_p": 0.9}, 0),
        (FLAT, {"min_p": 0.1}, 1),
        (PEAKED, {"min_p": 0.1}, 0),
        (FLAT, {"top_k": MAX_TOP_K_CANDIDATES}, 0),
        (FLAT, {"top_k": MAX_TOP_K_CANDIDATES + 1}, 1),
        (FLAT, {}, 0),
        (FLAT, {"logprobs": 3}, 1),
        (PEAKED, {"logprobs": 3}, 0),
        (PEAKED, {"logprobs": 0, "temperature": 0}, 0),
        (PEAKED, {"logprobs": 20, "temperature": 0, "logit_bias": {7: 100.0}}, 0),
        (FLAT, {"logprobs": 20, "temperature": 0, "logit_bias": {7: 100.0}}, 1),
    ],
)
def test_rows_whose_candidates_do_not_suffice_are_gathered_and_counted(logits, params, gathered, kernels) -> None:
    assert FLAT[0].argsort()[::-1].tolist().index(7) > LOGPROB_CANDIDATES
    if "logit_bias" in params and gathered == 0:
        logits = logits.copy()
        logits[0, 7] = 0.0
    row = make_row(seed=11, **params)
    ranks = Ranks(4, 4000, kernels)
    found = ranks.sample(np.concatenate([logits, logits]), [row, make_row(1, temperature=0)])
    expected = Sampler().sample(torch.from_numpy(np.concatenate([logits, logits])), [row, make_row(1, temperature=0)])
    assert_same(found, expected)
    assert ranks.fallback_rows == gathered
    assert ranks.count(Site.LOGITS) == gathered


@WHERE
@pytest.mark.parametrize("size", [NUCLEUS_CANDIDATES - 1, NUCLEUS_CANDIDATES, NUCLEUS_CANDIDATES + 1])
def test_the_largest_nucleus_that_candidates_hold(size, kernels) -> None:
    """`size` equal logits above a floor: top_p takes all of them, from shards that hold unequal shares."""
    logits = np.full((1, 4000), -50, np.float32)
    logits[0, 1000 - size // 3 : 1000 - size // 3 + size] = 0
    for params in ({"top_p": 1 - 0.5 / size}, {"min_p": 0.5}):
        ranks = Ranks(4, 4000, kernels)
        tokens = set()
        for seed in range(12):
            row = make_row(seed=seed, **params)
            found = ranks.sample(logits, [row])
            assert_same(found, Sampler().sample(torch.from_numpy(logits), [row]))
            tokens.add(found.sampled[0].token_id >= 1000)
        assert tokens == {False, True}
        # All but one of the candidates may be kept by min_p: the last one shows that there are no more.
        fits = size <= NUCLEUS_CANDIDATES if "top_p" in params else size < NUCLEUS_CANDIDATES
        assert ranks.fallback_rows == (0 if fits else 12)


@WHERE
def test_many_rows_are_gathered_in_parts(kernels) -> None:
    logits = np.repeat(FLAT, 130, axis=0)
    rows = [make_row(i, seed=i, top_p=0.9) for i in range(130)]
    ranks = Ranks(2, 4000, kernels)
    assert_same(ranks.sample(logits, rows), Sampler().sample(torch.from_numpy(logits), rows))
    assert (ranks.fallback_rows, ranks.count(Site.LOGITS)) == (130, 3)


@WHERE
@pytest.mark.parametrize("world_size", [2, 4, 5])
def test_draws_from_the_whole_vocabulary_follow_the_cumulative_sum(world_size, kernels) -> None:
    """At the middle of each token's share of [0, 1): in float64, of the whole row."""
    vocab_size = 90
    rng = np.random.default_rng(3)
    logits = rng.normal(size=vocab_size).astype(np.float32)
    logits[rng.integers(0, vocab_size, 20)] = -np.inf
    logits[16:32] = -np.inf  # nothing to draw in a whole panel
    weights = np.exp(logits.astype(np.float64) / 0.7)
    upper = np.cumsum(weights / weights.sum())
    middle = upper - weights / weights.sum() / 2
    ranks = Ranks(world_size, vocab_size, kernels)
    row = make_row(temperature=0.7)
    likely = np.flatnonzero(weights > 1e-3).tolist()
    for token_id in likely:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("headrace.engine.sampler.uniform_at", lambda *_, u=middle[token_id]: float(u))
            (found,) = ranks.sample(logits[None], [row]).sampled
        assert found.token_id == token_id
    owners = {next(r for r in range(world_size) if t in shard_vocabulary(vocab_size, r, world_size)) for t in likely}
    assert len(owners) >= world_size - 1


@WHERE
@pytest.mark.parametrize("uniform", [0.0, 1 - 2.0**-53])
def test_draws_at_the_ends_of_the_unit_interval(uniform, kernels) -> None:
    logits = np.zeros((1, 80), np.float32)
    logits[0, :20] = logits[0, 70:] = -np.inf
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("headrace.engine.sampler.uniform_at", lambda *_: uniform)
        (found,) = Ranks(5, 80, kernels).sample(logits, [make_row()]).sampled
    assert found.token_id == (20 if uniform == 0 else 69)


@WHERE
def test_a_sequence_that_left_and_came_back_is_counted_anew(kernels) -> None:
    """The counts of penalties live as long as their sequence is sampled, on each rank as in one process."""
    logits = np.zeros((1, 64), np.float32)
    ranks, one = Ranks(2, 64, kernels), Sampler()
    for step in range(4):
        output = list(range(10 * step, 10 * step + 3))
        row = make_row(seq_id=step % 2, output=output, temperature=0, frequency_penalty=-1.0)
        assert_same(ranks.sample(logits, [row]), one.sample(torch.from_numpy(logits), [row]))


@pytest.mark.parametrize("world_size", [1, 2, 5])
def test_prompt_logprobs_of_gathered_rows(world_size) -> None:
    logits = torch.randn(9, 131, generator=torch.Generator().manual_seed(1))
    targets = [5, 0, 130, 64, 64, 17, 16, 15, 100]
    ranks = Ranks(world_size, 131)

    def run(group: ThreadGroup):
        return prompt_logprobs(ranks.samplers[group.rank].whole_rows(ranks.shard(group, logits)), targets, 3)

    for found in on_ranks(ranks.groups, run):
        assert found == prompt_logprobs(logits, targets, 3)


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_a_device_says_what_the_host_says(world_size) -> None:
    """Bit for bit but for sums, also of ranks that have fewer tokens than there are places, or none."""
    params = [{"top_k": 30}, {}, {"logprobs": 2}, {"top_p": 0.5, "logprobs": 1, "logit_bias": {20: 5.0}}]
    rows = [make_row(i, seed=i, **each) for i, each in enumerate(params)]
    logits = torch.from_numpy(np.random.default_rng(2).normal(size=(4, 33)).round(0).astype(np.float32))
    asked = RecordedRows(rows, [record_of(row, 33, world_size) for row in rows])
    for rank in range(world_size):
        ids = shard_vocabulary(33, rank, world_size)
        shard = logits[:, ids.start : ids.stop].contiguous()
        host = HostShard(ids, rank, Sampler()).say(shard, asked, None).words.numpy()
        device = DeviceShard(DEVICE, ids, rank, Sampler()).say(shard, asked, None).words.numpy()
        assert host[: asked.starts[0]].tolist() == device[: asked.starts[0]].tolist()
        for record, start in zip(asked.records, asked.starts, strict=False):
            part = slice(start, start + record.num_words)
            mine, its = (read_shares(words[None, part], record, np.zeros(1, np.float32)) for words in (host, device))
            for candidates, others in ((mine.candidates, its.candidates), (mine.raw_candidates, its.raw_candidates)):
                assert [part.tolist() for part in candidates] == [part.tolist() for part in others]
            np.testing.assert_allclose(mine.weight_sums, its.weight_sums, rtol=1e-6)
            np.testing.assert_allclose(mine.raw_sums, its.raw_sums, rtol=1e-6)


@pytest.mark.parametrize("num_candidates", [0, 1, 3])
def test_places_without_a_candidate_say_so(num_candidates) -> None:
    """Whatever the words held before: a rank that has nothing to say must not change what others say."""
    words = np.full(6, 12345, np.int32)
    given = Candidates(np.array([40, 2, 50])[:num_candidates], np.array([9, 8, 8], np.float32)[:num_candidates])
    write_candidates_(words, given)
    record = RowRecord(largest_shard=3, num_candidates=3)
    other = np.full(6, 12345, np.int32)
    write_candidates_(other, Candidates(np.array([7, 8, 9]), np.array([-1, -1, -1], np.float32)))
    shares = read_shares(np.stack([words, other]), record, np.zeros(2, np.float32))
    assert shares.candidates.token_ids.tolist() == [*given.token_ids.tolist(), 7, 8, 9][:3]
    assert shares.largest.tolist() == [9.0 if num_candidates else -math.inf, -1.0]


def test_records_stay_within_the_largest_shard() -> None:
    """No more candidates than a shard has tokens, and as many bytes on every rank."""
    for vocab_size in (1, 20, 300, 32000):
        for world_size in (1, 2, 5):
            row = make_row(top_k=500, logprobs=20)
            record = record_of(row, vocab_size, world_size)
            largest = vocabulary_shard_sizes(vocab_size, world_size)[0]
            assert record.num_places <= largest
            assert record.num_raw_places == min(LOGPROB_CANDIDATES, largest)


@pytest.mark.parametrize(
    ("params", "changes", "words"),
    [
        ({"temperature": 0}, False, 0),
        ({"temperature": 0}, True, 2),
        ({"top_k": 20}, False, 40),
        ({"top_k": 20, "top_p": 0.5, "min_p": 0.1}, True, 40),
        ({"top_p": 0.5}, False, 2 * 256 + 2),
        ({"min_p": 0.5}, False, 2 * 256),
        ({}, False, 2 + 2),
        ({"logprobs": 5}, False, 2 + 2 + 2 * 64 + 2),
        ({"temperature": 0, "logprobs": 0}, False, 2 * 64 + 2),
        ({"top_k": 5000}, False, 0),
    ],
)
def test_words_of_a_record(params, changes, words) -> None:
    record = row_record(SamplingParams(**params), changes_logits=changes, vocab_size=32000, largest_shard=16000)
    assert record.num_words == words
    assert candidates_payload_bytes([record, record]) == 2 * 4 * (2 + words)
