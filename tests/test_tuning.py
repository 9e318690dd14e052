"""Heuristic dataflow: inflection points from times, their cache, and their use. Arms give equal bits (other tests)."""

import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_model import write_tiny_model

import headrace
from headrace.cli.main import main
from headrace.config import DataflowChoice, WeightFormat
from headrace.engine import tune
from headrace.engine.tune import LinearWeights, prepare_dataflow
from headrace.errors import ConfigError
from headrace.kernels import KernelChoice, resolve_kernels
from headrace.kernels.dataflow import Dataflow
from headrace.kernels.linear_machine import DEFAULT_INFLECTIONS
from headrace.kernels.tuning import LINEAR, Inflections, LinearArm, LinearShape, TunedShape, find_inflections
from headrace.kernels.tuning_cache import TuningCache, TuningKey, default_folder

pytest.importorskip("headrace.kernels.cpu", reason="the native module is not built", exc_type=ImportError)

ROWS = (1, 2, 4, 8, 16, 32, 64, 128)
SHAPE = LinearShape(weight_format=WeightFormat.INT4, out_features=64, in_features=32)
KEY = TuningKey(cpu="a cpu", num_threads=2, instruction_set="avx2", kernels="0123")


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def times(gemv, flat_gemm, gemm):
    return {
        arm: {m: function(m) for m in ROWS} for arm, function in zip(LinearArm, (gemv, flat_gemm, gemm), strict=True)
    }


# Costs with known crossings: GEMV is overtaken after M = 2, flat GEMM after M = 32.
CROSSING = times(lambda m: m, lambda m: 2.5 + 0.1 * m, lambda m: 4.3 + 0.05 * m)


def test_inflections_are_where_one_arm_overtakes_the_next():
    assert find_inflections(CROSSING, DEFAULT_INFLECTIONS) == Inflections(flat_gemm_from=4, gemm_from=64)


@pytest.mark.parametrize("outlier", ROWS[2:-1])
def test_one_noisy_time_moves_a_point_no_further_than_itself(outlier):
    """The published search stops at the first crossing it sees."""
    noisy = {arm: dict(seconds) for arm, seconds in CROSSING.items()}
    noisy[LinearArm.GEMM][outlier] *= 0.5
    found = find_inflections(noisy, DEFAULT_INFLECTIONS)
    assert found.gemm_from in (64, outlier)
    assert all(found.arm(m) is find_inflections(CROSSING, DEFAULT_INFLECTIONS).arm(m) for m in ROWS if m < 4)


def test_arms_that_never_win_are_never_chosen():
    only_gemv = find_inflections(times(lambda m: 1.0, lambda m: 9.0, lambda m: 9.0), DEFAULT_INFLECTIONS)
    assert {only_gemv.arm(m) for m in ROWS} == {LinearArm.GEMV}
    only_gemm = find_inflections(times(lambda m: 9.0, lambda m: 9.0, lambda m: 1.0), DEFAULT_INFLECTIONS)
    assert {only_gemm.arm(m) for m in ROWS} == {LinearArm.GEMM}


def test_an_arm_without_times_is_left_out():
    """As the ablation does: GEMV and GEMM alone meet at M = 4.5."""
    without = {arm: seconds for arm, seconds in CROSSING.items() if arm is not LinearArm.FLAT_GEMM}
    found = find_inflections(without, DEFAULT_INFLECTIONS)
    assert found == Inflections(flat_gemm_from=8, gemm_from=8)


def test_ties_take_the_default():
    tied = times(lambda m: 1.0, lambda m: 1.01, lambda m: 0.995)
    assert find_inflections(tied, DEFAULT_INFLECTIONS) == DEFAULT_INFLECTIONS


def test_an_arm_given_up_is_not_chosen_where_it_was_not_measured():
    given_up = {arm: dict(seconds) for arm, seconds in CROSSING.items()}
    given_up[LinearArm.GEMV] = {1: 1.0, 2: 2.0}
    assert find_inflections(given_up, DEFAULT_INFLECTIONS) == Inflections(flat_gemm_from=4, gemm_from=64)


@given(st.lists(st.tuples(*[st.floats(0.1, 10)] * 3), min_size=8, max_size=8))
def test_no_other_pair_of_points_has_less_regret(rows):
    measured = {arm: {m: row[i] for m, row in zip(ROWS, rows, strict=True)} for i, arm in enumerate(LinearArm)}

    def regret(points: Inflections) -> float:
        ratios = (measured[points.arm(m)][m] / min(measured[arm][m] for arm in LinearArm) for m in ROWS)
        return sum(math.log(ratio) if ratio > 1.02 else 0.0 for ratio in ratios)

    found = find_inflections(measured, DEFAULT_INFLECTIONS)
    thresholds = (*ROWS, 129)
    best = min(regret(Inflections(flat_gemm_from=a, gemm_from=b)) for a in thresholds for b in thresholds if a <= b)
    assert regret(found) <= best + 1e-6


# The cache

TUNED = TunedShape(
    inflections=Inflections(flat_gemm_from=3, gemm_from=40), measured_on="2026-01-02", times={LinearArm.GEMV: {1: 0.5}}
)


def test_cache_keeps_what_it_was_given_and_what_was_there(tmp_path):
    cache, other = (
        TuningCache(KEY, tmp_path),
        LinearShape(weight_format=WeightFormat.INT8, out_features=1, in_features=2),
    )
    assert cache.load(LINEAR) == {}
    cache.keep(LINEAR, {SHAPE: TUNED})
    cache.keep(LINEAR, {other: TUNED})
    assert TuningCache(KEY, tmp_path).load(LINEAR) == {SHAPE: TUNED, other: TUNED}
    assert [file.suffix for file in tmp_path.iterdir()] == [".json"]


@pytest.mark.parametrize(
    "change", [{"cpu": "b"}, {"num_threads": 3}, {"instruction_set": "portable"}, {"kernels": "4"}]
)
def test_measurements_hold_for_one_machine_and_one_build(tmp_path, change):
    TuningCache(KEY, tmp_path).keep(LINEAR, {SHAPE: TUNED})
    other = TuningKey(**{"cpu": "a cpu", "num_threads": 2, "instruction_set": "avx2", "kernels": "0123", **change})
    assert TuningCache(other, tmp_path).load(LINEAR) == {}


@pytest.mark.parametrize("text", ["", "{", "[]", '{"linear": [{}]}', '{"linear": 3}', "\x00\xff"])
def test_a_broken_file_counts_as_none_and_is_replaced(tmp_path, text):
    cache = TuningCache(KEY, tmp_path)
    cache.file.write_text(text)
    assert cache.load(LINEAR) == {}
    cache.keep(LINEAR, {SHAPE: TUNED})
    assert cache.load(LINEAR) == {SHAPE: TUNED}


def test_the_cache_is_the_users(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_folder().is_relative_to(tmp_path)
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert default_folder() == tmp_path / "home" / ".cache" / "headrace" / "tuning"


# In use


def make_weights(kernels, sizes=((64, 32), (32, 64), (64, 32))):
    weights = []
    for rows, columns in sizes:
        builder = kernels.make_weight_builder(WeightFormat.INT4, rows, columns)
        builder.write(0, torch.randn(rows, columns))
        weights.append(builder.build())
    return LinearWeights.of(weights, torch.float32)


def test_a_first_start_measures_and_a_second_one_looks_up(monkeypatch):
    monkeypatch.setattr(tune, "_MIN_WEIGHT_BYTES", 0)
    kernels = resolve_kernels(KernelChoice.CPU)
    weights = make_weights(kernels)
    assert {shape: len(same) for shape, same in weights.by_shape.items()} == {
        SHAPE: 2,
        LinearShape(weight_format=WeightFormat.INT4, out_features=32, in_features=64): 1,
    }
    prepare_dataflow(kernels, weights, DataflowChoice.MEASURED, 2, show_progress=False)
    assert set(kernels.dataflow.tuned) == set(weights.by_shape)
    again = resolve_kernels(KernelChoice.CPU)
    monkeypatch.setattr(Dataflow, "measure", lambda *args, **kwargs: pytest.fail("measured twice"))
    prepare_dataflow(again, weights, DataflowChoice.MEASURED, 2, show_progress=False)
    assert again.dataflow.tuned == kernels.dataflow.tuned
    assert "measured on" in again.dataflow.explain(SHAPE)
    unknown = LinearShape(weight_format=WeightFormat.INT8, out_features=1, in_features=1)
    assert "not measured" in again.dataflow.explain(unknown)


def test_a_small_model_is_not_measured():
    kernels = resolve_kernels(KernelChoice.CPU)
    prepare_dataflow(kernels, make_weights(kernels), DataflowChoice.MEASURED, 2, show_progress=False)
    assert kernels.dataflow.tuned == {}
    assert not default_folder().exists()


def test_a_cache_that_cannot_be_written_is_no_error(monkeypatch, tmp_path):
    monkeypatch.setattr(tune, "_MIN_WEIGHT_BYTES", 0)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    kernels = resolve_kernels(KernelChoice.CPU)
    prepare_dataflow(kernels, make_weights(kernels), DataflowChoice.MEASURED, 2, show_progress=False)
    assert kernels.dataflow.tuned


def test_ctrl_c_skips_what_is_left(monkeypatch):
    monkeypatch.setattr(tune, "_MIN_WEIGHT_BYTES", 0)
    kernels = resolve_kernels(KernelChoice.CPU)
    weights = make_weights(kernels)
    measure, calls = Dataflow.measure, []

    def interrupted_at_second(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return measure(self, *args, **kwargs)

    monkeypatch.setattr(Dataflow, "measure", interrupted_at_second)
    prepare_dataflow(kernels, weights, DataflowChoice.MEASURED, 2, show_progress=False)
    assert len(kernels.dataflow.tuned) == 1


@pytest.mark.parametrize("choice", ["gemv", "flat_gemm", "gemm"])
def test_a_forced_implementation_runs_every_m_and_says_so(choice):
    kernels = resolve_kernels(KernelChoice.CPU)
    prepare_dataflow(kernels, make_weights(kernels), DataflowChoice(choice), 2, show_progress=False)
    assert {kernels.dataflow.arm(SHAPE, m).value for m in (1, 2, 1000)} == {choice}
    assert "as asked for" in kernels.dataflow.explain(SHAPE)


def test_reference_kernels_have_nothing_to_choose():
    kernels = resolve_kernels(KernelChoice.REFERENCE)
    prepare_dataflow(
        kernels, make_weights(resolve_kernels(KernelChoice.CPU)), DataflowChoice.MEASURED, 1, show_progress=False
    )
    assert kernels.dataflow is None


def test_llm_takes_the_choice_and_refuses_others(tmp_path):
    folder = write_tiny_model(tmp_path / "model")
    llm = headrace.LLM(folder, dataflow="gemm", num_threads=1)
    assert llm.engine.model.kernels.dataflow.arm(SHAPE, 1) is LinearArm.GEMM
    with pytest.raises(ConfigError, match="dataflow is 'gemn'; did you mean"):
        headrace.LLM(folder, dataflow="gemn")


# The command


def test_tune_measures_keeps_and_shows(tmp_path, capsys):
    folder = write_tiny_model(tmp_path / "model")
    assert main(["tune", "--model", str(folder), "--rounds", "1", "--plot", str(tmp_path / "plot.svg")]) == 0
    out, err = capsys.readouterr()
    assert "[128, 32] float32" in out
    assert str(default_folder()) in err
    assert "<svg" in (tmp_path / "plot.svg").read_text()
    assert len(list(default_folder().iterdir())) == 1


def test_tune_as_json(tmp_path, capsys):
    folder = write_tiny_model(tmp_path / "model")
    assert main(["tune", "--model", str(folder), "--rounds", "1", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert {"weight_format", "out_features", "in_features", "flat_gemm_from", "gemm_from", "seconds"} <= set(
        report["linear"][0]
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rounds", "0"], "--rounds is 0"),
        (["--plot", "x.txt"], "must end in .png"),
        (["--plot", "no/such/x.png"], "no folder"),
    ],
)
def test_tune_refuses_what_it_cannot_do(capsys, arguments, message):
    assert main(["tune", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_tune_with_the_reference_says_why_not(monkeypatch, capsys):
    monkeypatch.setenv("HEADRACE_KERNELS", "reference")
    assert main(["tune"]) == 2
    assert "nothing to tune" in capsys.readouterr().err


def test_info_says_what_is_chosen_for_each_shape_and_why(tmp_path, capsys):
    folder = write_tiny_model(tmp_path / "model")
    assert main(["tune", "--model", str(folder), "--rounds", "1", "--json"]) == 0
    tuned = json.loads(capsys.readouterr().out)["linear"]
    assert main(["info", "--model", str(folder), "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["dataflow"]
    assert len(rows) - 1 == len(tuned) == 5  # and one for attention
    assert all("measured on" in row["dataflow"] for row in rows)
    assert main(["info", "--model", str(folder), "--quantize", "int8", "--json"]) == 0
    other_format = json.loads(capsys.readouterr().out)["dataflow"]
    assert any("not measured here" in row["dataflow"] for row in other_format)
