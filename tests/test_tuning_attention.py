"""Softmax scheme and pieces over the context: the choice from times, its cache, and who has the last word."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_model import write_tiny_model

import headrace
from headrace.cli.main import main
from headrace.config import DataflowChoice, KvCacheFormat, Softmax, SoftmaxScheme, WeightFormat
from headrace.engine import tune_attention, tune_contexts, tune_kinds
from headrace.engine.softmax import resolve_softmax
from headrace.engine.tune import look_up
from headrace.engine.tune_attention import candidates, contexts_of, measure_attention, measure_queued
from headrace.errors import ConfigError
from headrace.kernels import KernelChoice, resolve_kernels
from headrace.kernels.attention_tuning import (
    ATTENTION,
    AttentionChoice,
    AttentionShape,
    ChosenAttention,
    TunedAttention,
    find_attention_choice,
)
from headrace.kernels.tuning import LINEAR, Inflections, LinearShape, TunedShape
from headrace.kernels.tuning_cache import TuningCache, TuningKey
from headrace.models.softmax_calibration import FILE_NAME, LogitRange, save_calibration

pytest.importorskip("headrace.kernels.cpu", reason="the native module is not built", exc_type=ImportError)

SYNCHRONIZED, LAZY, ASYNCHRONIZED = SoftmaxScheme.SYNCHRONIZED, SoftmaxScheme.LAZY, SoftmaxScheme.ASYNCHRONIZED
SCHEMES = tuple(SoftmaxScheme)
CONTEXTS = (128, 512, 2048)
SHAPE = AttentionShape(cache_format=KvCacheFormat.INT8, num_heads=4, num_kv_heads=2, head_dim=8)
KEY = TuningKey(cpu="a cpu", num_threads=2, instruction_set="avx2", kernels="0123")


@pytest.fixture(autouse=True)
def _own_cache_and_little_memory(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(tune_contexts, "_WORKING_SET_BYTES", 2**20)


def tuned(**seconds):
    """Every candidate at 1 s for every context, but those of the schemes named."""
    times = {
        choice: dict.fromkeys(CONTEXTS, seconds.get(choice.scheme.value, 1.0)) for choice in candidates(SCHEMES, 2)
    }
    return TunedAttention(measured_on="2026-01-02", times=times)


# The choice


def test_the_fastest_is_chosen_among_those_allowed():
    times = tuned(lazy=0.8, asynchronized=0.5).times
    assert find_attention_choice(times, SCHEMES).scheme is ASYNCHRONIZED
    assert find_attention_choice(times, (SYNCHRONIZED, LAZY)).scheme is LAZY
    assert find_attention_choice(times, (SYNCHRONIZED,)) == AttentionChoice()


def test_ties_take_the_default():
    assert find_attention_choice(tuned(lazy=0.985, asynchronized=0.99).times, SCHEMES) == AttentionChoice()


def test_pieces_are_chosen_over_all_contexts():
    """Fewer pieces win for the shortest context, and lose more for the longest."""
    times = {choice: dict(seconds) for choice, seconds in tuned().times.items()}
    few, many = (AttentionChoice(scheme=SYNCHRONIZED, max_pieces=n) for n in (2, 16))
    times[few].update({128: 0.9, 2048: 1.5})
    times[many].update({2048: 0.7})
    assert find_attention_choice(times, SCHEMES) == many


def test_a_scheme_that_was_not_measured_is_taken_as_it_is():
    only_synchronized = {AttentionChoice(): {128: 1.0}}
    assert find_attention_choice(only_synchronized, (LAZY,)) == AttentionChoice(scheme=LAZY)


@given(st.lists(st.tuples(*[st.floats(0.1, 10)] * len(CONTEXTS)), min_size=12, max_size=12))
def test_no_other_choice_has_less_regret(rows):
    times = {
        choice: dict(zip(CONTEXTS, row, strict=True)) for choice, row in zip(candidates(SCHEMES, 2), rows, strict=True)
    }

    def slowdown(choice: AttentionChoice) -> float:
        ratios = (times[choice][n] / min(seconds[n] for seconds in times.values()) for n in CONTEXTS)
        return math.prod(ratios) ** (1 / len(CONTEXTS))

    assert slowdown(find_attention_choice(times, SCHEMES)) <= 1.02 * min(map(slowdown, times)) + 1e-6


# The measurement


def test_the_best_round_counts_and_all_choices_take_turns():
    kernels, now, calls, everyone = resolve_kernels(KernelChoice.CPU), [0.0], [], candidates(SCHEMES, 2)

    def seconds_of(choice, context_len):
        return context_len * (0.5 if choice.scheme is LAZY else 1.0)

    def run(choice, context_len):
        num_round, turn = divmod(len(calls), len(everyone))
        calls.append((choice, context_len))
        # Every other call is disturbed, and in the next round the others are.
        now[0] += seconds_of(choice, context_len) + (1e6 if (num_round + turn) % 2 else 0.0)

    found = measure_attention(
        kernels,
        SHAPE,
        contexts=CONTEXTS,
        num_threads=2,
        num_rounds=4,
        make_run=lambda *_: run,
        clock=lambda: now[0],
    )
    assert [choice for choice, _ in calls[: len(everyone)]] == everyone
    assert len(calls) == 4 * len(CONTEXTS) * len(everyone)
    for choice, seconds in found.times.items():
        assert seconds == pytest.approx({n: seconds_of(choice, n) for n in CONTEXTS}, abs=1e-3)
    assert found.choice(SCHEMES) == ChosenAttention(scheme=LAZY, max_pieces={1: None})


def test_queued_calls_are_timed_for_every_choice():
    """As on a GPU, but that the calls of a CPU are over when they return."""
    everyone = candidates(SCHEMES, 2, (1, 3))
    assert [choice.max_pieces for choice in everyone[:3]] == [None, 2, 6]
    found = measure_queued(resolve_kernels(KernelChoice.CPU), SHAPE, everyone, {1: (40, 100)}, num_rounds=2)
    assert list(found.times) == everyone
    assert all(set(seconds) == {40, 100} and min(seconds.values()) > 0 for seconds in found.times.values())


def test_ctrl_c_leaves_what_was_measured_before(tmp_path, capsys, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(tune_kinds, "measure_attention", interrupted)
    folder = write_tiny_model(tmp_path / "model")
    assert main(["tune", "--model", str(folder), "--rounds", "1", "--threads", "2", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert list(report) == ["file", "linear", "attention", "prefill", "mixture"]
    assert report["attention"] is None
    cache = TuningCache(resolve_kernels(KernelChoice.CPU).tuning_key(2))
    assert len(report["linear"]) == len(cache.load(LINEAR)) == 5
    assert cache.load(ATTENTION) == {}


@pytest.mark.parametrize("cache_format", list(KvCacheFormat))
def test_kernels_are_measured_and_left_as_they_were(cache_format):
    kernels = resolve_kernels(KernelChoice.CPU)
    shape = AttentionShape(cache_format=cache_format, num_heads=4, num_kv_heads=2, head_dim=8)
    found = measure_attention(kernels, shape, contexts=(16, 100), num_threads=2, num_rounds=1)
    assert set(found.times) == set(candidates(SCHEMES, 2))
    assert all(seconds[n] > 0 for seconds in found.times.values() for n in (16, 100))
    assert found.batches == {}
    assert kernels.dataflow.max_pieces(1) is None


def test_contexts_are_those_the_model_can_have():
    assert contexts_of(2048) == [128, 512, 2048]
    assert contexts_of(100) == [100]


# The cache


def test_attention_and_linear_layers_are_kept_side_by_side(tmp_path):
    cache = TuningCache(KEY, tmp_path)
    linear = LinearShape(weight_format=WeightFormat.INT8, out_features=1, in_features=2)
    points = TunedShape(inflections=Inflections(flat_gemm_from=3, gemm_from=40), measured_on="2026-01-02")
    other = AttentionShape(cache_format=KvCacheFormat.BFLOAT16, num_heads=1, num_kv_heads=1, head_dim=8)
    cache.keep(LINEAR, {linear: points})
    cache.keep(ATTENTION, {SHAPE: tuned()})
    cache.keep(ATTENTION, {other: tuned(lazy=0.5)})
    cache.keep(LINEAR, {linear: points})
    assert TuningCache(KEY, tmp_path).load(ATTENTION) == {SHAPE: tuned(), other: tuned(lazy=0.5)}
    assert TuningCache(KEY, tmp_path).load(LINEAR) == {linear: points}


@pytest.mark.parametrize("section", ["3", "[3]", "[{}]", '[{"cache_format": "int8"}]', '{"a": 1}'])
def test_a_broken_section_counts_as_none(tmp_path, section):
    cache = TuningCache(KEY, tmp_path)
    cache.file.write_text('{"linear": [], "attention": ' + section + "}")
    assert cache.load(ATTENTION) == {}
    cache.keep(ATTENTION, {SHAPE: tuned()})
    assert cache.load(ATTENTION) == {SHAPE: tuned()}


def test_a_model_with_shorter_contexts_leaves_what_was_measured_of_longer_ones(tmp_path):
    """It replaced them, so that tuning one model made another with the same heads forget its long contexts."""
    cache = TuningCache(KEY, tmp_path)
    cache.keep(ATTENTION, {SHAPE: tuned()})
    shorter = {choice: {128: 0.5} for choice in candidates(SCHEMES, 2)}
    assert cache.keep(ATTENTION, {SHAPE: TunedAttention(measured_on="2026-01-03", times=shorter)})
    [found] = cache.load(ATTENTION).values()
    assert found.measured_on == "2026-01-03"
    assert set(map(tuple, map(dict.items, found.times.values()))) == {((128, 0.5), (512, 1.0), (2048, 1.0))}


def test_a_cache_that_cannot_be_written_is_no_failure(tmp_path):
    (tmp_path / "file").write_text("")
    assert not TuningCache(KEY, tmp_path / "file").keep(ATTENTION, {SHAPE: tuned()})


# Who has the last word


def resolve(tmp_path, choice=Softmax.AUTO, found=None):
    return resolve_softmax(
        choice,
        resolve_kernels(KernelChoice.CPU),
        tmp_path,
        num_layers=2,
        max_model_len=2048,
        cache_format=KvCacheFormat.INT8,
        tuned=found,
    )


def logits(largest_row_max):
    return LogitRange(
        least=-5,
        low_quantile=-4,
        high_quantile=4,
        largest=largest_row_max,
        least_row_max=-1,
        largest_row_max=largest_row_max,
        largest_value=1,
    )


def schemes(chosen):
    return [layer.scheme for layer in chosen.layers]


def test_without_a_measurement_the_default_is_used_and_says_so(tmp_path):
    chosen = resolve(tmp_path)
    assert (schemes(chosen), chosen.max_pieces) == ([SYNCHRONIZED] * 2, {1: None})
    assert chosen.reason == "synchronized softmax (the default softmax, pieces not measured here)"


def test_a_measurement_chooses_no_scheme_unless_asked(tmp_path):
    """A text would depend on the machine and its number of threads."""
    times = {choice: dict(seconds) for choice, seconds in tuned(lazy=0.5).times.items()}
    times[AttentionChoice(max_pieces=4)] = dict.fromkeys(CONTEXTS, 0.9)
    chosen = resolve(tmp_path, found=TunedAttention(measured_on="2026-01-02", times=times))
    assert (schemes(chosen), chosen.max_pieces) == ([SYNCHRONIZED] * 2, {1: 4})
    assert "the default softmax, pieces measured on 2026-01-02" in chosen.reason


def test_a_measurement_asked_for_must_be_there(tmp_path):
    with pytest.raises(ConfigError, match="headrace tune --model"):
        resolve(tmp_path, Softmax.MEASURED)


def test_a_measurement_is_used_and_says_so(tmp_path):
    times = {choice: dict(seconds) for choice, seconds in tuned(lazy=0.9).times.items()}
    times[AttentionChoice(scheme=LAZY, max_pieces=4)] = dict.fromkeys(CONTEXTS, 0.5)
    chosen = resolve(tmp_path, Softmax.MEASURED, TunedAttention(measured_on="2026-01-02", times=times))
    assert (schemes(chosen), chosen.max_pieces) == ([LAZY] * 2, {1: 4})
    assert chosen.reason == "lazy softmax, contexts in at most 4 pieces (measured on 2026-01-02)"


def test_a_scheme_asked_for_wins(tmp_path):
    chosen = resolve(tmp_path, Softmax.SYNCHRONIZED, tuned(lazy=0.5))
    assert schemes(chosen) == [SYNCHRONIZED] * 2
    assert "as asked for" in chosen.reason


def test_a_measurement_alone_does_not_choose_the_asynchronized_scheme(tmp_path):
    """Its constant must fit the model, which no timing can tell."""
    found = tuned(lazy=0.8, asynchronized=0.5)
    assert schemes(resolve(tmp_path, Softmax.MEASURED, found)) == [LAZY] * 2
    save_calibration([logits(5), logits(5)], tmp_path / FILE_NAME)
    assert schemes(resolve(tmp_path, Softmax.MEASURED, found)) == [ASYNCHRONIZED] * 2


def test_a_calibration_that_says_off_wins(tmp_path):
    found = tuned(lazy=0.8, asynchronized=0.5)
    save_calibration([logits(5), logits(500)], tmp_path / FILE_NAME)
    chosen = resolve(tmp_path, Softmax.MEASURED, found)
    assert schemes(chosen) == [ASYNCHRONIZED, SYNCHRONIZED]
    assert "1 of 2 layers synchronized" in chosen.reason
    save_calibration([logits(500), logits(500)], tmp_path / FILE_NAME)
    assert schemes(resolve(tmp_path, Softmax.MEASURED, found)) == [LAZY] * 2


@pytest.mark.parametrize("choice", [DataflowChoice.DEFAULT, DataflowChoice.GEMM])
def test_what_was_kept_is_not_used_if_the_user_says_so(choice):
    kernels = resolve_kernels(KernelChoice.CPU)
    TuningCache(kernels.tuning_key(2)).keep(ATTENTION, {SHAPE: tuned(lazy=0.5)})
    assert look_up(ATTENTION, kernels, DataflowChoice.MEASURED, 2) == {SHAPE: tuned(lazy=0.5)}
    assert look_up(ATTENTION, kernels, DataflowChoice.MEASURED, 3) == {}
    assert look_up(ATTENTION, kernels, choice, 2) == {}


def test_pieces_of_the_dataflow_change_no_bit():
    kernels = resolve_kernels(KernelChoice.CPU)
    kernels.set_num_threads(2)
    run = tune_attention._make_run(kernels, SHAPE, 3000)
    # The one context that the cache has room for, and so the same one each time.
    results = [run(AttentionChoice(max_pieces=n), kernels_room(kernels)) for n in (None, 1, 3, 16)]
    assert all(torch.equal(result, results[0]) for result in results)


def test_pieces_of_the_dataflow_reach_the_native_op(monkeypatch):
    kernels, given = resolve_kernels(KernelChoice.CPU), []
    monkeypatch.setattr(
        kernels.attention, "_native", SimpleNamespace(run=lambda *arguments: given.append(arguments[-1]))
    )
    run = tune_attention._make_run(kernels, SHAPE, 64)
    for most in (None, 3):
        run(AttentionChoice(max_pieces=most), 64)
    assert given == [0, 3]


def kernels_room(kernels):
    return tune_contexts._cache_spec(kernels, SHAPE, 1).num_slots


# The command and the engine


def test_tune_measures_keeps_and_later_starts_use_it(tmp_path, capsys):
    folder = write_tiny_model(tmp_path / "model")
    assert main(["tune", "--model", str(folder), "--rounds", "1", "--threads", "2"]) == 0
    out = capsys.readouterr().out
    assert "asynchronized softmax, contexts in at most 16 pieces" in out
    key = resolve_kernels(KernelChoice.CPU).tuning_key(2)
    [(shape, found)] = TuningCache(key).load(ATTENTION).items()
    assert set(found.times) == set(candidates(SCHEMES, 2))
    times = {choice: {64: 1.0} for choice in found.times} | {AttentionChoice(scheme=LAZY, max_pieces=4): {64: 0.5}}
    TuningCache(key).keep(ATTENTION, {shape: TunedAttention(measured_on="2026-01-02", times=times)})
    measured = ["--softmax", "measured"]
    assert main(["info", "--model", str(folder), "--threads", "2", "--json", *measured]) == 0
    row = json.loads(capsys.readouterr().out)["dataflow"][-1]
    assert row == {
        "attention": str(shape),
        "dataflow": "lazy softmax, contexts in at most 4 pieces (measured on 2026-01-02)",
    }
    llm = headrace.LLM(folder, num_threads=2, softmax="measured")
    assert llm.engine.model.kernels.dataflow.max_pieces(9) == 4
