"""Tiles of mixtures of experts: the choice from times, what is kept of it, and that every choice gives the mixture."""

import json
from dataclasses import replace

import pytest
import torch

from headrace.cli.main import main
from headrace.config import Activation, DataflowChoice, WeightFormat
from headrace.engine import tune_kinds, tune_mixture
from headrace.engine.tune import look_up_dataflow
from headrace.engine.tune_mixture import ModelMixtures, measure_mixture
from headrace.kernels import Experts, KernelChoice, MixtureSpec, resolve_kernels, timing
from headrace.kernels.attention_tuning import ATTENTION, AttentionChoice, TunedAttention
from headrace.kernels.mixture_tuning import (
    MIXTURE,
    ExpertLaunch,
    ExpertMatrix,
    MixtureShape,
    TunedMixture,
)
from headrace.kernels.tuning import Inflections, LinearArm, Tiles, TunedShape
from headrace.kernels.tuning_cache import DeviceTuningKey, TuningCache

pytest.importorskip("triton", reason="Triton is not installed")

from checkpoints import BY_NAME
from triton_device import DEVICE

from headrace.kernels.triton.expert_tiles import MOST_PAIRS, block_rows, expert_tile_choices
from headrace.kernels.triton.limits import H100

KEY = DeviceTuningKey(device="a gpu", toolkit="cuda 13.0", torch="2", triton="3", kernels="0")
SHAPE = MixtureShape(
    weight_format=WeightFormat.BFLOAT16, activation_bytes=2, num_experts=8, hidden_size=4096, intermediate_size=14336
)
UP, DOWN = (ExpertLaunch(matrix=matrix, block_rows=16) for matrix in ExpertMatrix)
DEFAULT, TIED, FAST = (Tiles(block_n=n, block_k=64) for n in (64, 32, 16))
MI300 = replace(H100, program_shared_bytes=2**16, shared_bytes=2**16, lanes=64)
SPEC = MixtureSpec(num_experts_per_token=1, renormalize=True, activation=Activation.SILU)


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def tuned_with(**seconds):
    launches = {"up": UP, "down": DOWN}
    return TunedMixture(measured_on="2026-01-02", times={launches[name]: found for name, found in seconds.items()})


def make_mixtures(kernels, num_layers=1):
    def make(rows, columns):
        builder = kernels.make_weight_builder(WeightFormat.INT8, rows, columns)
        builder.write(0, torch.randn(rows, columns))
        return builder.build()

    layers = [
        Experts(up=tuple(make(40, 64) for _ in range(2)), down=tuple(make(64, 20) for _ in range(2)))
        for _ in range(num_layers)
    ]
    return ModelMixtures(experts=layers, spec=SPEC, dtype=torch.float32)


def test_the_fastest_is_chosen_for_each_launch_and_of_equals_the_default():
    tuned = tuned_with(up={DEFAULT: 1.01, TIED: 1.0, FAST: 1.0}, down={DEFAULT: 1.03, TIED: 1.01, FAST: 1.0})
    assert tuned.tiles == {UP: DEFAULT, DOWN: TIED}


def test_measurements_are_kept_beside_others(tmp_path):
    cache = TuningCache(KEY, tmp_path)
    tuned, other = tuned_with(up={DEFAULT: 1.0, FAST: 0.5}), replace(SHAPE, weight_format=WeightFormat.INT4)
    assert cache.keep(MIXTURE, {SHAPE: tuned})
    assert cache.keep(MIXTURE, {other: tuned_with(down={DEFAULT: 2.0})})
    cache.keep(ATTENTION, {})
    assert cache.load(MIXTURE) == {SHAPE: tuned, other: tuned_with(down={DEFAULT: 2.0})}


@pytest.mark.parametrize("section", [[{}], [{"times": 3}], "text", None])
def test_a_broken_section_counts_as_none(tmp_path, section):
    cache = TuningCache(KEY, tmp_path)
    cache.keep(MIXTURE, {SHAPE: tuned_with(up={DEFAULT: 1.0})})
    text = json.loads(cache.file.read_text())
    cache.file.write_text(json.dumps(text | {"mixture": section}))
    assert cache.load(MIXTURE) == {}


@pytest.mark.parametrize("limits", [H100, MI300], ids=["h100", "mi300"])
@pytest.mark.parametrize("activation_bytes", [2, 4])
@pytest.mark.parametrize("rows", MOST_PAIRS)
@pytest.mark.parametrize("matrix", ExpertMatrix, ids=lambda m: m.value)
@pytest.mark.parametrize("weight_format", [WeightFormat.BFLOAT16, WeightFormat.INT4], ids=lambda f: f.value)
def test_every_launch_has_choices_that_fit(weight_format, matrix, rows, activation_bytes, limits):
    """K goes in steps of one length, so that a row's sum is added up alike by all."""
    shape = replace(SHAPE, activation_bytes=activation_bytes, weight_format=weight_format)
    if weight_format is WeightFormat.BFLOAT16 and activation_bytes == 4:
        shape = replace(shape, weight_format=WeightFormat.FLOAT32)
    choices = expert_tile_choices(shape, ExpertLaunch(matrix=matrix, block_rows=rows), limits)
    assert len(set(choices)) == len(choices) >= 2
    if weight_format is WeightFormat.INT4:
        assert {tiles.block_k for tiles in choices} == {max(64, 256 * 16 // rows)}
    else:
        assert {tiles.block_k for tiles in choices} == {128 // activation_bytes}
    for tiles in choices:
        width = tiles.block_n * (2 if matrix is ExpertMatrix.UP else 1)
        assert tiles.block_n >= 16, "the least that tensor cores take"
        buffers = tiles.num_stages if limits is H100 else 1
        weight_bytes = 0.5 if weight_format is WeightFormat.INT4 else activation_bytes
        program_bytes = buffers * (width * weight_bytes + rows * activation_bytes) * tiles.block_k
        assert program_bytes < limits.program_shared_bytes
        assert limits is H100 or tiles.num_stages == 2


def test_downs_of_few_tokens_have_programs_for_the_whole_gpu():
    """One token of Mixtral's, two experts; splits are for these launches alone, and not of a short K."""
    for weight_format in (WeightFormat.BFLOAT16, WeightFormat.INT8, WeightFormat.INT4):
        shape = replace(SHAPE, weight_format=weight_format)
        tiles = expert_tile_choices(shape, DOWN, H100)[0]
        assert 2 * shape.hidden_size // tiles.block_n * tiles.num_splits >= 3 * H100.num_multiprocessors
        for launch in (UP, ExpertLaunch(matrix=ExpertMatrix.DOWN, block_rows=32)):
            assert {tiles.num_splits for tiles in expert_tile_choices(shape, launch, H100)} == {1}
        short = replace(shape, intermediate_size=2047)
        assert {tiles.num_splits for tiles in expert_tile_choices(short, DOWN, H100)} == {1}


def test_pairs_are_measured_where_their_rows_are_used():
    for rows, pairs in tune_mixture.PAIRS_PER_EXPERT.items():
        assert block_rows(pairs * 8, 8) == rows
    assert set(tune_mixture.PAIRS_PER_EXPERT) == set(MOST_PAIRS)


def test_every_choice_of_tiles_gives_the_mixture():
    kernels = resolve_kernels(KernelChoice.TRITON, device=DEVICE)
    mixtures = make_mixtures(kernels)
    x, logits = torch.randn(3, 64, device=DEVICE), torch.randn(3, 2, device=DEVICE)
    wanted = kernels.mixture(x, logits, mixtures.experts[0], SPEC)
    for matrix in ExpertMatrix:
        launch = ExpertLaunch(matrix=matrix, block_rows=16)
        for tiles in kernels.dataflow.expert_tile_choices(mixtures.shape, launch):
            with kernels.dataflow.trying_expert_tiles(launch, tiles):
                assert kernels.dataflow.expert_tiles(mixtures.shape, launch) == tiles
                out = kernels.mixture(x, logits, mixtures.experts[0], SPEC)
            torch.testing.assert_close(out, wanted, rtol=1e-5, atol=1e-5)


def test_each_launch_is_timed_with_each_of_its_tiles(monkeypatch):
    kernels = resolve_kernels(KernelChoice.TRITON, device=DEVICE)
    mixtures, dataflow = make_mixtures(kernels, num_layers=2), kernels.dataflow
    monkeypatch.setattr(tune_mixture, "PAIRS_PER_EXPERT", dict.fromkeys(MOST_PAIRS, 1))
    seen, tried = [], {}

    def mixture(x, logits, experts, spec):
        seen.append(dict(dataflow._tried_expert_tiles))
        assert any(experts is layer for layer in mixtures.experts)
        return x

    class Timed:
        def __init__(self, calls, device):
            assert len(calls) == 2
            self._calls = calls

        def best_s(self, **_):
            self._calls[0]()
            [(launch, tiles)] = seen[-1].items()
            tried.setdefault(launch, []).append(tiles)
            return 1.0 if tiles == dataflow.expert_tile_choices(mixtures.shape, launch)[1] else 2.0

    monkeypatch.setattr(timing, "time_calls", Timed)
    tuned = measure_mixture(replace(kernels, mixture=mixture), mixtures, num_rounds=2)
    assert set(tuned.times) == {ExpertLaunch(matrix=m, block_rows=r) for m in ExpertMatrix for r in MOST_PAIRS}
    for launch in tuned.times:
        choices = dataflow.expert_tile_choices(mixtures.shape, launch)
        assert tried[launch] == choices * 2
        assert tuned.tiles[launch] == choices[1]
        assert dataflow.expert_tiles(mixtures.shape, launch) == choices[0], "a measurement leaves the choice as it was"


def test_the_cpu_has_nothing_to_choose():
    kernels = resolve_kernels(KernelChoice.REFERENCE)
    assert not kernels.has_expert_tiles


# In use


def test_tune_measures_mixtures_and_later_starts_use_and_explain_it(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HEADRACE_KERNELS", "triton")

    def measured(kernels, mixtures, **_):
        """The second choice is the best for all launches."""
        dataflow, shape = kernels.dataflow, mixtures.shape
        launches = [ExpertLaunch(matrix=matrix, block_rows=rows) for rows in MOST_PAIRS for matrix in ExpertMatrix]
        times = {e: dict(zip(dataflow.expert_tile_choices(shape, e), (2.0, 1.0), strict=False)) for e in launches}
        return TunedMixture(measured_on="2026-01-02", times=times)

    monkeypatch.setattr(tune_kinds, "measure_mixture", measured)
    points = TunedShape(
        inflections=Inflections(flat_gemm_from=2, gemm_from=9),
        measured_on="2026-01-02",
        times={a: {} for a in LinearArm},
    )
    monkeypatch.setattr(
        tune_kinds, "measure_shapes", lambda _kernels, _weights, shapes, **_: [(s, points) for s in shapes]
    )
    attention = TunedAttention(measured_on="2026-01-02", times={AttentionChoice(): {64: 1.0}})
    monkeypatch.setattr(tune_kinds, "measure_attention", lambda *_, **__: attention)
    monkeypatch.setattr(tune_kinds, "prefill_steps", lambda *_: [])
    folder = tmp_path / "model"
    BY_NAME["mixtral"].write(folder)
    assert main(["tune", "--model", str(folder), "--rounds", "1", "--device", DEVICE.type]) == 0
    assert "up, 16 rows" in capsys.readouterr().out
    kernels = resolve_kernels(KernelChoice.TRITON, device=DEVICE)
    look_up_dataflow(kernels, DataflowChoice.MEASURED, 1)
    [(shape, tuned)] = kernels.dataflow.tuned_mixtures.items()
    assert len(tuned.times) == 8
    assert kernels.dataflow.expert_tiles(shape, UP) == tuned.tiles[UP]
    assert kernels.dataflow.expert_tile_choices(shape, UP).index(tuned.tiles[UP]) == 1
    assert main(["info", "--model", str(folder), "--json", "--device", DEVICE.type]) == 0
    rows = json.loads(capsys.readouterr().out)["dataflow"]
    [row] = [row for row in rows if "mixture" in row]
    assert row["mixture"] == str(shape)
    assert f"up, 16 rows: {tuned.tiles[UP]}" in row["dataflow"]
    assert f"measured on {tuned.measured_on}" in row["dataflow"]
    experts = {f"[{2 * shape.intermediate_size}, ", f", {shape.intermediate_size}]"}
    assert not any(part in row.get("linear", "") for row in rows for part in experts), (
        "experts are no linear layers here"
    )
