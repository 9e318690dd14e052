"""Prompts' attention by the kernel or the library: the choice from times, its cache, and who uses it."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_model import write_tiny_model

pytest.importorskip("triton", reason="Triton is not installed")

from triton_device import DEVICE

import headrace
from headrace.cli.main import main
from headrace.config import DataflowChoice, KvCacheFormat
from headrace.engine import tune_attention, tune_contexts, tune_kinds, tune_prefill
from headrace.engine.tune import look_up
from headrace.engine.tune_prefill import prefill_steps
from headrace.kernels import KernelChoice, resolve_kernels
from headrace.kernels.attention_tuning import AttentionShape
from headrace.kernels.prefill_tuning import (
    PREFILL,
    PrefillArm,
    PrefillStep,
    TunedPrefill,
    explain_prefill,
    find_library_from,
)
from headrace.kernels.triton.attention import Attention
from headrace.kernels.tuning import LINEAR, Inflections, TunedShape
from headrace.kernels.tuning_cache import DeviceTuningKey, TuningCache

SHAPE = AttentionShape(cache_format=KvCacheFormat.INT8, num_heads=4, num_kv_heads=2, head_dim=16)
KEY = DeviceTuningKey(device="a gpu", toolkit="cuda 13", torch="2", triton="3", kernels="0123")
CHUNKS = (128, 512, 2048)
POINTS = TunedShape(inflections=Inflections(flat_gemm_from=2, gemm_from=9), measured_on="2026-01-02")


def step(num_tokens, cached=0):
    return PrefillStep(num_tokens=num_tokens, context_len=num_tokens + cached)


def tuned(**library_s):
    """The kernel takes 1 s for each step; the library what is said, by the tokens of a chunk: t128=0.5."""
    steps = [step(n, cached) for n in CHUNKS for cached in (0, 64)]
    library = {s: library_s.get(f"t{s.num_tokens}", 1.0) for s in steps}
    times = {PrefillArm.KERNEL: dict.fromkeys(steps, 1.0), PrefillArm.LIBRARY: library}
    return TunedPrefill(measured_on="2026-01-02", times=times)


@pytest.mark.parametrize(
    ("library_s", "expected"),
    [
        ({}, None),
        ({"t2048": 0.99, "t128": 0.99}, None),
        ({"t128": 1.5, "t512": 0.9, "t2048": 0.5}, 512),
        ({"t128": 0.5, "t512": 0.9, "t2048": 0.5}, 128),
        ({"t128": 0.9, "t512": 1.5, "t2048": 0.5}, 2048),
        ({"t128": 0.5, "t512": 0.5, "t2048": 1.5}, 128),
        ({"t128": 0.5, "t2048": 3.0}, None),
    ],
)
def test_the_point_with_the_least_regret(library_s, expected):
    assert tuned(**library_s).min_library_tokens == expected


@given(st.lists(st.tuples(st.floats(0.1, 10), st.floats(0.1, 10)), min_size=6, max_size=6))
def test_no_other_point_is_faster_by_more_than_ties(rows):
    steps = list(tuned().times[PrefillArm.KERNEL])
    pairs = dict(zip(steps, rows, strict=True))
    times = {arm: {s: pair[i] for s, pair in pairs.items()} for i, arm in enumerate(PrefillArm)}

    def slowdown(point):
        product = 1.0
        for s, (kernel_s, library_s) in pairs.items():
            product *= (library_s if point is not None and s.num_tokens >= point else kernel_s) / min(pairs[s])
        return product

    assert slowdown(find_library_from(times)) <= min(map(slowdown, (None, *CHUNKS))) * 1.02**6 + 1e-6


def test_what_was_kept_is_read_again_beside_other_shapes(tmp_path):
    cache = TuningCache(KEY, tmp_path)
    other = AttentionShape(cache_format=KvCacheFormat.BFLOAT16, num_heads=1, num_kv_heads=1, head_dim=8)
    assert cache.keep(PREFILL, {SHAPE: tuned()})
    assert cache.keep(PREFILL, {other: tuned(t128=0.5)})
    cache.keep(LINEAR, {})
    assert TuningCache(KEY, tmp_path).load(PREFILL) == {SHAPE: tuned(), other: tuned(t128=0.5)}
    cache.file.write_text('{"prefill": [{"cache_format": "int8"}]}')
    assert cache.load(PREFILL) == {}
    (tmp_path / "file").write_text("")
    assert not TuningCache(KEY, tmp_path / "file").keep(PREFILL, {SHAPE: tuned()})


def test_steps_are_those_of_the_model_that_the_library_can_take():
    kernels = resolve_kernels(KernelChoice.TRITON, device=DEVICE)
    assert [s.num_tokens for s in prefill_steps(kernels, SHAPE, 600)] == [128, 256, 512]
    assert [s.context_len for s in prefill_steps(kernels, SHAPE, 4300)][-2:] == [4096, 4224]
    no_heads = AttentionShape(cache_format=KvCacheFormat.INT8, num_heads=4, num_kv_heads=2, head_dim=20)
    assert prefill_steps(kernels, no_heads, 600) == []
    assert prefill_steps(resolve_kernels(KernelChoice.REFERENCE), SHAPE, 600) == []


def test_tune_measures_both_and_later_starts_use_it(tmp_path, capsys, monkeypatch):
    """From the command to the attention op; linear layers and decoding have tests of their own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HEADRACE_KERNELS", "triton")
    monkeypatch.setattr(tune_contexts, "_WORKING_SET_BYTES", 2**12)
    monkeypatch.setattr(tune_prefill, "CHUNKS", (8, 16))
    monkeypatch.setattr(tune_prefill, "CACHED", (0, 8))
    monkeypatch.setattr(tune_kinds, "measure_attention", lambda *_, **__: tune_attention_result())
    monkeypatch.setattr(tune_kinds, "measure_shapes", lambda _, __, shapes, **___: [(s, POINTS) for s in shapes])
    is_librarys, chosen = Attention._is_librarys, []
    monkeypatch.setattr(Attention, "_is_librarys", lambda *args: chosen.append(is_librarys(*args)) or chosen[-1])
    folder = write_tiny_model(tmp_path / "model")
    assert main(["tune", "--model", str(folder), "--rounds", "1", "--threads", "1", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)["prefill"]
    assert chosen.count(True) == chosen.count(False) == 4
    assert [row["context_len"] for row in report["steps"]] == [8, 16, 16, 24]
    assert all(set(row["seconds"]) == {"kernel", "library"} for row in report["steps"])
    kernels = resolve_kernels(KernelChoice.TRITON, device=DEVICE)
    cache = TuningCache(kernels.tuning_key(1))
    [(shape, found)] = cache.load(PREFILL).items()
    cache.keep(PREFILL, {shape: tuned(t512=0.5, t2048=0.5)})
    assert look_up(PREFILL, kernels, DataflowChoice.DEFAULT, 1) == {}
    assert explain_prefill(found).endswith(f"(measured on {found.measured_on})")
    assert main(["info", "--model", str(folder), "--threads", "1", "--json"]) == 0
    row = json.loads(capsys.readouterr().out)["dataflow"][-1]
    assert row == {
        "attention": f"prompts of {shape}",
        "dataflow": "the kernel below 512 tokens, then the library where it can (measured on 2026-01-02)",
    }
    llm = headrace.LLM(folder, num_threads=1)
    assert llm.engine.model.kernels.dataflow.prefill_library_from == 512


def tune_attention_result():
    choice = tune_attention.AttentionChoice()
    return tune_attention.TunedAttention(measured_on="2026-01-02", times={choice: {8: 1.0}})
