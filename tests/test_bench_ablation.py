"""The ablation: every variant computes in its own way, and the report names all of them. No speed is asserted."""

import json
import re
from dataclasses import replace

import pytest
from profile_run import run_profile_on_cpu
from tiny_model import write_tiny_model

from headrace.bench.ablation import WARM_UP_STEPS, load_switchboard, measure_ablation
from headrace.bench.ablation_variants import BASELINE, VARIANTS
from headrace.bench.model import BenchSettings
from headrace.bench.rounds import RoundRunner
from headrace.cli.main import main
from headrace.config import EngineConfig, KvCacheFormat, LoadConfig, SamplingParams, SoftmaxScheme
from headrace.engine.engine import Engine
from headrace.errors import KernelError
from headrace.kernels import KernelChoice, SoftmaxCounts, SoftmaxSpec, kernel_choice_from, resolve_kernels
from headrace.kernels.tuning import Inflections, LinearArm
from headrace.models.softmax_calibration import FILE_NAME, LogitRange, asynchronized_spec, save_calibration

NATIVE = resolve_kernels(kernel_choice_from()).dataflow is not None
needs_native = pytest.mark.skipif(not NATIVE, reason="without native kernels there is nothing to switch off")
BY_KEY = {variant.key: variant for variant in VARIANTS}
MEASURED = Inflections(flat_gemm_from=2, gemm_from=6)
"""With these 1, 4 and 8 rows go to three implementations."""

TIMES = {
    LinearArm.GEMV: {1: 1.0, 2: 2.0, 4: 4.0, 8: 8.0},
    LinearArm.FLAT_GEMM: {1: 2.0, 2: 1.0, 4: 1.0, 8: 6.0},
    LinearArm.GEMM: {1: 5.0, 2: 5.0, 4: 5.0, 8: 5.0},
}
"""Without flat GEMM it is GEMV that takes 4 rows, not GEMM."""

RANGE = LogitRange(
    least=-9.0,
    low_quantile=-8.0,
    high_quantile=6.0,
    largest=7.0,
    least_row_max=-3.0,
    largest_row_max=7.0,
    largest_value=2.5,
)


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def model(tmp_path):
    return write_tiny_model(tmp_path / "tiny")


@pytest.fixture
def switchboard(model):
    found = load_switchboard(EngineConfig(load=LoadConfig(model=str(model)), num_threads=1))
    measured = {shape: replace(tuned, inflections=MEASURED, times=TIMES) for shape, tuned in found._measured.items()}
    found._measured = measured
    return found


@needs_native
def test_layers_are_told_apart_after_what_loading_runs_on_a_gpu(model, monkeypatch):
    """Its caches were counted as layers, and the model's own as more than there are."""
    run_profile_on_cpu(monkeypatch)
    found = load_switchboard(EngineConfig(load=LoadConfig(model=str(model)), num_threads=1))
    found.set(BASELINE)
    engine = Engine(found.model)
    engine.add_request("one", [5, 6, 7], SamplingParams(temperature=0, max_tokens=3))
    while engine.has_unfinished:
        engine.step()
    assert len(found._attention.counts()) == found.model.config.num_hidden_layers


@needs_native
def test_variants_of_which_some_are_not_replayed_are_not_compared(switchboard, monkeypatch):
    obstacles = iter([None, None, "an op waits"])
    monkeypatch.setattr(type(switchboard), "obstacle", property(lambda _: next(obstacles)))
    settings = BenchSettings(context_lens=(8,), batch_sizes=(), num_rounds=1, decode_tokens=2)
    with pytest.raises(KernelError, match=r"lazy softmax are not replayed and others are.*an op waits"):
        measure_ablation(switchboard, settings, lambda _: None)


@pytest.fixture
def run(capsys):
    def call(*argv):
        code = main(["bench", "ablation", *map(str, argv)])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


@needs_native
@pytest.mark.parametrize(
    ("key", "arms"),
    [
        ("all", ("gemv", "flat_gemm", "gemm")),
        ("synchronized", ("gemv", "flat_gemm", "gemm")),
        ("lazy", ("gemv", "flat_gemm", "gemm")),
        ("gemv", ("gemv", "gemv", "gemv")),
        ("gemm", ("gemv", "gemm", "gemm")),
        ("default", ("gemv", "flat_gemm", "flat_gemm")),
        ("flat_gemm", ("flat_gemm", "flat_gemm", "flat_gemm")),
        ("none", ("gemm", "gemm", "gemm")),
        ("asynchronized_alone", ("gemm", "gemm", "gemm")),
        ("flat_gemm_alone", ("flat_gemm", "flat_gemm", "flat_gemm")),
        ("dataflow_alone", ("gemv", "gemv", "gemm")),
        ("again", ("gemv", "flat_gemm", "gemm")),
    ],
)
def test_decode_steps_go_to_the_implementations_of_a_variant(switchboard, monkeypatch, key, arms):
    """Recorded steps of the variant before must not live on: each change is followed by real calls."""
    dataflow, chosen = switchboard.model.kernels.dataflow, set()
    original = type(dataflow).arm

    def watch(self, shape, num_rows):
        arm = original(self, shape, num_rows)
        chosen.add((shape, num_rows, arm))
        return arm

    runner = RoundRunner(Engine(switchboard.model), repeats_prompts=True)
    for size in (1, 4, 8):
        switchboard.set(BY_KEY["gemm" if key == "gemv" else "gemv"])
        runner.run(size, 8, 2)
    monkeypatch.setattr(type(dataflow), "arm", watch)
    switchboard.set(BY_KEY[key])
    for size, expected in zip((1, 4, 8), arms, strict=True):
        chosen.clear()
        runner.run(size, 7, 2)
        # Prompts of 7 tokens have a number of rows that no decode step has, but for the head; so all shapes are asked.
        asked = {(shape, LinearArm(expected)) for shape in switchboard.inflections}
        assert {(shape, arm) for shape, num_rows, arm in chosen if num_rows == size} == asked


@needs_native
@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.key)
def test_only_the_asynchronized_softmax_counts_rows(switchboard, variant):
    runner = RoundRunner(Engine(switchboard.model), repeats_prompts=True)
    switchboard.set(BASELINE if variant.softmax is not BASELINE.softmax else BY_KEY["lazy"])
    runner.run(2, 8, 3)
    before = switchboard.counts()
    switchboard.set(variant)
    runner.run(2, 8, 3)
    # Two sequences of 8 prompt tokens and 3 steps, 4 heads, 2 layers.
    num_rows = 2 * (8 + 3) * 4 * 2 if variant.softmax is SoftmaxScheme.ASYNCHRONIZED else 0
    assert switchboard.counts().since(before).num_rows == num_rows


@needs_native
def test_lazy_and_synchronized_are_told_apart(switchboard):
    switchboard.set(BY_KEY["lazy"])
    assert switchboard._attention.softmax == (SoftmaxSpec(scheme=SoftmaxScheme.LAZY),) * 2
    switchboard.set(BY_KEY["synchronized"])
    assert switchboard._attention.softmax == (SoftmaxSpec(),) * 2


@needs_native
def test_every_variant_decodes_the_same_tokens(switchboard):
    """Weights and cache are shared, and a variant changes speed alone."""
    engine, tokens = Engine(switchboard.model), {}
    for variant in VARIANTS:
        switchboard.set(variant)
        engine.add_request(variant.key, range(5, 25), SamplingParams(temperature=0, max_tokens=12, ignore_eos=True))
        while engine.has_unfinished:
            for update in engine.step():
                if update.finished is not None:
                    tokens[variant.key] = update.finished.outputs[0].token_ids
    assert len(tokens) == len(VARIANTS)
    assert all(found == tokens["all"] for found in tokens.values())


@needs_native
def test_variants_take_turns_and_each_round_begins_with_another(switchboard, monkeypatch):
    started, turns = [], []
    original = type(switchboard).set
    monkeypatch.setattr(type(switchboard), "set", lambda self, v: turns.append(v.key) or original(self, v))
    settings = BenchSettings(prefill_tokens=(), context_lens=(20,), batch_sizes=(2,), decode_tokens=2, num_rounds=2)
    speeds = measure_ablation(switchboard, settings, started.append)
    keys = list(BY_KEY)
    assert started == [f"{name}, round {i} of 2" for name in ("context of 20", "batch of 2") for i in (1, 2)]
    assert turns == 2 * (keys + keys[1:] + keys[:1]) + ["all"]
    assert speeds.keys() == BY_KEY.keys()
    for speed in speeds.values():
        assert (speed.decode_step_s.keys(), speed.batch_step_s.keys(), speed.prefill_s) == ({20}, {2}, {})
        assert min(*speed.decode_step_s.values(), *speed.batch_step_s.values()) > 0


@needs_native
def test_layers_that_a_calibration_switches_off_are_forced(model):
    far = replace(RANGE, least=-500.0, least_row_max=-500.0)
    save_calibration((RANGE, far), model / FILE_NAME)
    forced = load_switchboard(EngineConfig(load=LoadConfig(model=str(model)), num_threads=1)).asynchronized
    sizes = {"max_model_len": 8192, "cache_format": KvCacheFormat.FLOAT32}
    assert forced.softmax == (asynchronized_spec(RANGE, **sizes), asynchronized_spec(far, **sizes))
    assert {spec.scheme for spec in forced.softmax} == {SoftmaxScheme.ASYNCHRONIZED}
    assert forced.num_layers_off == 1


@needs_native
def test_json_names_every_variant_and_figure(run, model):
    code, out, err = run(
        *("--model", model, "--json", "--rounds", 1, "--context-lens", 20, "--decode-tokens", 2),
        *("--batch-sizes", 1, 3, "--threads", 1, "--quantize", "int4"),
    )
    report = json.loads(out)
    assert (code, err) == (0, "")
    assert [variant["key"] for variant in report["variants"]] == list(BY_KEY)
    by_key = {variant["key"]: variant for variant in report["variants"]}
    for variant in VARIANTS:
        found = by_key[variant.key]
        assert found["alone_on" if variant.is_alone else "switched_off"] == variant.idea
        assert found["decode_from_20"] > 0
        assert found["batched_decode"].keys() == {"1", "3"}
        for baseline in ("all", "none") if variant.is_alone else ("all",):
            base = by_key[baseline]
            ratios = {"context_20": found["decode_from_20"] / base["decode_from_20"]}
            for size in ("1", "3"):
                ratios[f"batch_{size}"] = found["batched_decode"][size] / base["batched_decode"][size]
            assert found[f"ratio_to_{baseline}"] == pytest.approx(ratios, abs=2e-4)
        assert ("ratio_to_none" in found) == variant.is_alone
    assert report["formats"] == {"linear": "int4", "kv_cache": "float32"}
    assert report["asynchronized"]["num_rows"] > 0
    assert report["asynchronized"]["num_layers_off"] is None
    assert "prefill_tokens" not in report["protocol"]
    assert {points["shape"] for points in report["inflections"]} >= {"[64, 32] int4", "[32, 64] int4"}


@needs_native
def test_table_says_what_was_switched_off_and_which_is_the_default(run, model):
    code, out, _ = run("--model", model, "--rounds", 1, "--context-lens", "--batch-sizes", 2, "--threads", 1)
    assert code == 0
    for text in ("batch of 2", "synchronized softmax (the default)", "lazy", "GEMV, row by row", "heuristic dataflow"):
        assert text in out
    off, alone = out.split("\n\n")[:2]
    assert off.count("heuristic dataflow") == 2
    assert alone.splitlines()[0] == "decode, tokens/s (ratio to none of them on)"
    rows = [re.split(" {2,}", line) for line in alone.splitlines()[2:]]
    assert [row[0] for row in rows] == ["nothing", "asynchronized softmax", "flat GEMM", "heuristic dataflow"]
    assert [len(row[2].split()) for row in rows] == [1, 2, 2, 2], "a ratio to the first"
    assert "subtracts 0: the model has no calibration" in out
    assert "from 512" not in out


@needs_native
def test_a_short_model_shortens_contexts_and_says_so(run, model):
    code, out, _ = run(
        *("--model", model, "--rounds", 1, "--max-model-len", 100, "--decode-tokens", 2, "--batch-sizes", 1),
        *("--threads", 1, "--json"),
    )
    report = json.loads(out)
    assert code == 0
    longest = 100 - len(VARIANTS) * (WARM_UP_STEPS + 2) - 2
    assert report["protocol"]["context_lens"] == [longest]
    assert len([remark for remark in report["remarks"] if remark.startswith(f"--context-lens is {longest}")]) == 2


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--softmax", "lazy"], "--softmax is 'lazy'; leave it out"),
        (["--dataflow", "gemm"], "--dataflow is 'gemm'; leave it out"),
        (["--rounds", "0"], "--rounds is 0; it must be at least 1"),
        (["--context-lens", "--batch-sizes"], "there is nothing to measure"),
        (["--batch-sizes", "64"], "--batch-sizes 64 is above --max-num-seqs"),
        (["--context-lens", "99999"], "do not fit max_model_len"),
        (["--max-model-len", "30"], "max_model_len is 30; the benchmark needs 46"),
    ],
)
@needs_native
def test_what_cannot_be_measured_is_refused(run, model, argv, message):
    code, out, err = run("--model", model, "--threads", "1", *argv)
    assert (code, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1


def test_reference_kernels_have_nothing_to_switch_off(run, model, monkeypatch):
    monkeypatch.setenv("HEADRACE_KERNELS", KernelChoice.REFERENCE.value)
    code, out, err = run("--model", model)
    assert (code, out) == (2, "")
    assert "nothing to switch off" in err


def test_counts_are_taken_apart():
    later, earlier = SoftmaxCounts(num_rows=9, num_recomputed_rows=4), SoftmaxCounts(num_rows=5, num_recomputed_rows=1)
    assert later.since(earlier) == SoftmaxCounts(num_rows=4, num_recomputed_rows=3)
