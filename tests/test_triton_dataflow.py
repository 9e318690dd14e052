"""Heuristic dataflow on a GPU: default tiles for an H100, the choice among tiles by time, and what is kept."""

import gc
import weakref
from math import ceil

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from headrace.config import DataflowChoice, WeightFormat
from headrace.engine import tune
from headrace.engine.tune import LinearWeights, prepare_dataflow
from headrace.kernels import KernelChoice, resolve_kernels
from headrace.kernels.dataflow import Dataflow
from headrace.kernels.linear_machine import Rotation
from headrace.kernels.tuning import LINEAR, Inflections, LinearArm, LinearShape, Tiles, TunedShape
from headrace.kernels.tuning_cache import DeviceTuningKey, TuningCache
from headrace.kernels.weights import DenseWeight

pytest.importorskip("triton", reason="Triton is not installed")

from triton_device import DEVICE, IS_INTERPRETED

from headrace.kernels.triton.dataflow import TritonMachine, _more_than_cached, tuning_key
from headrace.kernels.triton.limits import H100
from headrace.kernels.triton.linear import Linear
from headrace.kernels.triton.tiles import default_inflections, pipeline_stages, tile_choices

LLAMA_2_7B = ((12288, 4096), (4096, 4096), (22016, 4096), (4096, 11008), (32000, 4096))
QUANTIZED = (WeightFormat.INT8, WeightFormat.INT4)
ITEM_BYTES = {WeightFormat.FLOAT32: 4, WeightFormat.BFLOAT16: 2}

each_format = pytest.mark.parametrize("weight_format", WeightFormat, ids=lambda f: f.value)


def shape_of(n, k, weight_format=WeightFormat.BFLOAT16):
    return LinearShape(weight_format=weight_format, out_features=n, in_features=k)


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


# Defaults


@pytest.mark.parametrize(("n", "k"), LLAMA_2_7B)
def test_default_tiles_of_llama_use_the_whole_gpu(n, k):
    """Of 132 multiprocessors at most 4 are left without work, all programs run at once, and loads in flight cover what
    bandwidth times latency asks for: 20 KiB on each multiprocessor, twice."""
    tiles = tile_choices(shape_of(n, k), LinearArm.FLAT_GEMM, H100)[0]
    num_programs = ceil(n / tiles.block_n) * tiles.num_splits
    assert num_programs >= 128
    stage_bytes = (tiles.block_n + 16) * tiles.block_k * 2
    buffers = tiles.num_stages - (1 if tiles.block_n < 64 else 0)
    assert num_programs <= H100.shared_bytes // (buffers * stage_bytes + 1024) * H100.num_multiprocessors
    in_flight_bytes = num_programs * (buffers - 1) * tiles.block_n * tiles.block_k * 2
    assert in_flight_bytes / H100.num_multiprocessors >= 40 * 2**10


@pytest.mark.parametrize(("n", "k"), LLAMA_2_7B)
@pytest.mark.parametrize("weight_format", QUANTIZED, ids=lambda f: f.value)
def test_default_tiles_of_quantized_llama_keep_cuda_cores_busy(weight_format, n, k):
    """At least three programs for each multiprocessor, which all run at once: 16 rows of x take most shared memory."""
    tiles = tile_choices(shape_of(n, k, weight_format), LinearArm.FLAT_GEMM, H100)[0]
    num_programs = ceil(n / tiles.block_n) * tiles.num_splits
    assert num_programs >= 3 * H100.num_multiprocessors
    column_bytes = tiles.block_n * (0.5 if weight_format is WeightFormat.INT4 else 1) + 16 * 2
    scale_bytes = tiles.block_n * 4 * tiles.block_k // 64
    program_bytes = (tiles.num_stages - 1) * (tiles.block_k * column_bytes + scale_bytes) + 1024
    assert num_programs <= H100.shared_bytes // program_bytes * H100.num_multiprocessors
    assert k / tiles.num_splits >= 1024


@pytest.mark.parametrize(("n", "k"), LLAMA_2_7B)
def test_default_gemv_has_programs_for_all_and_no_pipeline(n, k):
    tiles = tile_choices(shape_of(n, k), LinearArm.GEMV, H100)[0]
    assert (tiles.block_n, tiles.block_k, tiles.num_stages) == (8, 8 * 32 * 4, 1)
    assert n / tiles.block_n >= 2 * H100.num_multiprocessors


@each_format
def test_defaults_go_from_gemv_to_the_library(weight_format):
    points = default_inflections(shape_of(4096, 4096, weight_format))
    assert points.flat_gemm_from <= points.gemm_from
    assert points.arm(1) is (LinearArm.FLAT_GEMM if weight_format in QUANTIZED else LinearArm.GEMV)
    assert points.arm(4096) is LinearArm.GEMM


@given(st.sampled_from(WeightFormat), st.integers(1, 300_000), st.integers(1, 60_000), st.sampled_from(LinearArm))
def test_any_shape_has_tiles_that_fit(weight_format, n, k, arm):
    shape = shape_of(n, k, weight_format)
    choices = tile_choices(shape, arm, H100)
    assert len(set(choices)) == len(choices)
    assert (choices == []) is (arm is LinearArm.GEMM)
    for tiles in choices:
        for size in (tiles.block_n, tiles.block_k, tiles.num_splits, tiles.num_warps):
            assert size & (size - 1) == 0, "Triton's tiles are powers of two"
        assert tiles.num_stages >= 1
        if arm is LinearArm.FLAT_GEMM and weight_format in ITEM_BYTES:
            for block_m in (8, 16, 32, 64):
                stage_bytes = (tiles.block_n + block_m) * tiles.block_k * ITEM_BYTES[weight_format]
                assert pipeline_stages(tiles, stage_bytes, H100) * stage_bytes <= max(
                    H100.program_shared_bytes, stage_bytes
                )


@each_format
@pytest.mark.parametrize("arm", [LinearArm.GEMV, LinearArm.FLAT_GEMM], ids=lambda arm: arm.value)
def test_every_choice_of_tiles_gives_the_product(weight_format, arm):
    kernels = resolve_kernels(KernelChoice.TRITON, device=DEVICE)
    builder = kernels.make_weight_builder(weight_format, 20, 600)
    builder.write(0, torch.randn(20, 600))
    weight = builder.build()
    dtype = torch.bfloat16 if weight_format is WeightFormat.BFLOAT16 else torch.float32
    x = torch.randn(2, 600).to(DEVICE, dtype)
    ids = torch.arange(20, device=DEVICE)
    # The embedding, tested by itself, reads back what the weight stands for.
    wanted = x.double() @ kernels.embedding(ids, weight, dtype=torch.float32).double().T

    class OneChoice(TritonMachine):
        def tiles(self, shape, arm):
            return [tiles]

    for tiles in tile_choices(weight.linear_shape, arm, H100):
        out = Linear(DEVICE, Dataflow(OneChoice(DEVICE)))(x, weight, arm=arm, out_dtype=torch.float32)
        assert (out.double() - wanted).abs().max() < 1e-5 * wanted.abs().max(), tiles


# Measurement

FAST, SLOW, TIED = Tiles(block_n=1, block_k=64), Tiles(block_n=2, block_k=64), Tiles(block_n=4, block_k=64)


class ScriptedMachine:
    """A machine whose times are known: seconds by arm and tiles, times the number of rows for GEMV."""

    device = torch.device("cpu")
    quick_rows = (1, 4)

    def __init__(self, flat_gemm, gemv=1.0, gemm=50.0):
        self.seconds = {LinearArm.FLAT_GEMM: flat_gemm, LinearArm.GEMV: gemv, LinearArm.GEMM: gemm}
        self.dataflow = Dataflow(self)
        self.runs = []

    def default_inflections(self, shape):
        return Inflections(flat_gemm_from=2, gemm_from=99)

    def tiles(self, shape, arm):
        return list(self.seconds[arm]) if isinstance(self.seconds[arm], dict) else []

    def stopwatch(self, run, rotation):
        run(rotation.next())
        num_rows = self.runs[-1]

        def seconds():
            arm = self.dataflow.arm(shape_of(8, 8), num_rows)
            found = self.seconds[arm]
            if isinstance(found, dict):
                return found[self.dataflow.tiles(shape_of(8, 8), arm)]
            return found * num_rows if arm is LinearArm.GEMV else found

        return seconds

    def measure(self, **settings):
        return self.dataflow.measure(
            lambda x, weight: self.runs.append(len(x)),
            [DenseWeight(data=torch.ones(8, 8))],
            shape_of(8, 8),
            dtype=torch.float32,
            num_rows=(1, 2, 4, 8),
            num_rounds=2,
            **settings,
        )


def test_the_best_tiles_are_found_and_timed():
    machine = ScriptedMachine({SLOW: 3.0, FAST: 1.5})
    tuned = machine.measure(compares_tiles=True)
    assert tuned.tiles == {LinearArm.FLAT_GEMM: FAST}
    assert tuned.times[LinearArm.FLAT_GEMM] == dict.fromkeys((1, 2, 4, 8), 1.5)
    assert tuned.inflections.flat_gemm_from == 2


def test_tiles_that_tie_are_the_default():
    assert ScriptedMachine({TIED: 1.01, FAST: 1.0}).measure(compares_tiles=True).tiles == {LinearArm.FLAT_GEMM: TIED}
    assert ScriptedMachine({TIED: 1.03, FAST: 1.0}).measure(compares_tiles=True).tiles == {LinearArm.FLAT_GEMM: FAST}


def test_a_quick_measurement_takes_the_default_tiles():
    machine = ScriptedMachine({SLOW: 3.0, FAST: 1.5})
    tuned = machine.measure()
    assert tuned.tiles == {LinearArm.FLAT_GEMM: SLOW}
    assert tuned.inflections.flat_gemm_from == 4


def test_a_measurement_leaves_the_choice_as_it_was_and_a_result_in_use_changes_it():
    machine = ScriptedMachine({SLOW: 3.0, FAST: 1.5})
    tuned = machine.measure(compares_tiles=True)
    dataflow, shape = machine.dataflow, shape_of(8, 8)
    assert dataflow.tiles(shape, LinearArm.FLAT_GEMM) == SLOW
    assert dataflow.arm(shape, 3) is LinearArm.FLAT_GEMM
    dataflow.tuned[shape] = tuned
    assert dataflow.tiles(shape, LinearArm.FLAT_GEMM) == FAST


def test_weights_that_a_cache_could_hold_are_copied():
    """A weight read again too soon would come from the cache."""
    weights = [DenseWeight(data=torch.full((4, 4), float(i))) for i in range(2)]
    several = _more_than_cached(weights, 5 * 64 - 1)
    assert len({weight.data.data_ptr() for weight in several}) == len(several) == 5
    assert [float(weight.data[0, 0]) for weight in several] == [0.0, 1.0, 0.0, 1.0, 0.0]
    assert _more_than_cached(weights, 64) == weights[:1]
    assert len(_more_than_cached(weights, 2**40)) == 256


def test_copies_are_made_once_and_let_go_with_what_they_are_for():
    machine = TritonMachine(DEVICE)
    rotation = Rotation([DenseWeight(data=torch.ones(256, 1024))])
    copies = machine._weights(rotation)
    assert machine._weights(rotation) is copies
    assert len(copies) > 1
    found = weakref.ref(copies[1].data)
    del rotation, copies
    gc.collect()
    assert found() is None


# What is kept


def test_tiles_are_kept(tmp_path):
    key = DeviceTuningKey(device="a gpu", toolkit="cuda 13.0", torch="2", triton="3", kernels="0")
    tuned = TunedShape(
        inflections=Inflections(flat_gemm_from=3, gemm_from=40),
        measured_on="2026-01-02",
        tiles={LinearArm.GEMV: FAST, LinearArm.FLAT_GEMM: Tiles(block_n=32, block_k=64, num_splits=2, num_stages=5)},
    )
    TuningCache(key, tmp_path).keep(LINEAR, {shape_of(8, 8): tuned})
    assert TuningCache(key, tmp_path).load(LINEAR) == {shape_of(8, 8): tuned}


@pytest.mark.parametrize("change", ["device", "toolkit", "torch", "triton", "kernels"])
def test_measurements_hold_for_one_device_and_its_software(change):
    facts = {"device": "a gpu", "toolkit": "cuda 13.0", "torch": "2", "triton": "3", "kernels": "0"}
    caches = [TuningCache(DeviceTuningKey(**facts | changes)) for changes in ({}, {change: "other"})]
    assert caches[0].file != caches[1].file


def test_the_key_says_what_it_was_measured_on():
    key = tuning_key(DEVICE)
    assert key == tuning_key(DEVICE)
    assert key.torch == torch.__version__
    assert (key.device == "Triton's interpreter") is IS_INTERPRETED


# In use


def test_a_first_start_measures_and_a_second_one_looks_up(monkeypatch):
    monkeypatch.setattr(tune, "_MIN_WEIGHT_BYTES", 0)
    monkeypatch.setattr(TritonMachine, "quick_rows", (1, 4))
    kernels = resolve_kernels(KernelChoice.TRITON, device=DEVICE)
    weights = []
    for weight_format in (WeightFormat.INT4, WeightFormat.FLOAT32):
        builder = kernels.make_weight_builder(weight_format, 24, 40)
        builder.write(0, torch.randn(24, 40))
        weights.append(builder.build())
    found = LinearWeights.of(weights, torch.float32)
    assert set(found.by_shape) == {shape_of(24, 40, f) for f in (WeightFormat.INT4, WeightFormat.FLOAT32)}
    prepare_dataflow(kernels, found, DataflowChoice.MEASURED, 1, show_progress=False)
    assert set(kernels.dataflow.tuned) == set(found.by_shape)
    again = resolve_kernels(KernelChoice.TRITON, device=DEVICE)
    monkeypatch.setattr(Dataflow, "measure", lambda *args, **kwargs: pytest.fail("measured twice"))
    prepare_dataflow(again, found, DataflowChoice.MEASURED, 1, show_progress=False)
    assert again.dataflow.tuned == kernels.dataflow.tuned
