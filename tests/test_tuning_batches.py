"""Pieces of decode attention by batch: what is measured on a GPU, chosen, kept and shown."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from headrace.cli.tune_tables import TABLES
from headrace.config import KvCacheFormat, Softmax, SoftmaxScheme
from headrace.engine import tune_attention, tune_contexts
from headrace.engine.softmax import resolve_softmax
from headrace.engine.tune_attention import batch_contexts, candidates, measure_attention, measure_queued
from headrace.kernels import KernelChoice, resolve_kernels
from headrace.kernels.attention_tuning import (
    ATTENTION,
    AttentionChoice,
    AttentionShape,
    ChosenAttention,
    TunedAttention,
)
from headrace.kernels.dataflow import Dataflow
from headrace.kernels.tuning_cache import TuningCache, TuningKey

SYNCHRONIZED, LAZY = SoftmaxScheme.SYNCHRONIZED, SoftmaxScheme.LAZY
SHAPE = AttentionShape(cache_format=KvCacheFormat.BFLOAT16, num_heads=4, num_kv_heads=2, head_dim=8)
TOKEN_BYTES = 2 * 2 * 8 * 2
KEY = TuningKey(cpu="a cpu", num_threads=2, instruction_set="avx2", kernels="0123")


def times(best, contexts=(128, 512)):
    """2 s for every choice but the best, which takes 1 s."""
    choices = candidates((SYNCHRONIZED, LAZY), 2, (1, 3))
    return {choice: dict.fromkeys(contexts, 1.0 if choice == best else 2.0) for choice in choices}


def pieces(count, scheme=SYNCHRONIZED):
    return AttentionChoice(scheme=scheme, max_pieces=count)


TUNED = TunedAttention(
    measured_on="2026-01-02",
    times=times(pieces(2)),
    batches={8: times(pieces(6, LAZY)), 64: times(pieces(6), contexts=(128,))},
)


# The choice


def test_each_batch_has_its_own_number_and_all_have_one_scheme():
    """With the lazy one 8 sequences would be faster, and a row's bits would show how many there are."""
    assert TUNED.choice([SYNCHRONIZED, LAZY]) == ChosenAttention(scheme=SYNCHRONIZED, max_pieces={1: 2, 8: None, 64: 6})
    assert TUNED.choice([LAZY]).max_pieces == {1: None, 8: 6, 64: None}


def test_a_launch_takes_the_nearest_batch_at_or_below_its_size():
    dataflow = Dataflow()
    assert dataflow.max_pieces(1) is None
    dataflow.max_pieces_from = {1: 2, 8: 5, 64: None}
    assert [dataflow.max_pieces(n) for n in (1, 7, 8, 63, 64, 1000)] == [2, 2, 5, 5, None, None]


def test_people_read_which_number_is_for_which_batch():
    assert str(TUNED.choice([SYNCHRONIZED])) == (
        "synchronized softmax, programs of a launch: 2 from 1 sequence, the default from 8 sequences, "
        "6 from 64 sequences"
    )
    table = "\n".join(TABLES["attention"]({SHAPE: TUNED}))
    assert str(TUNED.choice([SYNCHRONIZED])) in table
    assert [line.split("  ")[0] for line in table.splitlines() if "sequences  " in line] == [
        "the same, 8 sequences",
        "the same, 64 sequences",
    ]


def test_a_model_takes_them_all_and_says_so(tmp_path):
    chosen = resolve_softmax(
        Softmax.AUTO,
        resolve_kernels(KernelChoice.REFERENCE),
        tmp_path,
        num_layers=1,
        max_model_len=512,
        cache_format=SHAPE.cache_format,
        tuned=TUNED,
    )
    assert chosen.max_pieces == {1: 2, 8: None, 64: 6}
    assert chosen.reason == f"{TUNED.choice([SYNCHRONIZED])} (the default softmax, pieces measured on 2026-01-02)"


# What is kept


def test_batches_are_kept(tmp_path):
    cache = TuningCache(KEY, tmp_path)
    assert cache.keep(ATTENTION, {SHAPE: TUNED})
    [found] = cache.load(ATTENTION).values()
    assert found == TUNED
    assert list(found.batches) == [8, 64]


def test_a_file_from_before_batches_is_loaded(tmp_path):
    cache = TuningCache(KEY, tmp_path)
    cache.keep(ATTENTION, {SHAPE: TUNED})
    content = json.loads(cache.file.read_text())
    del content["attention"][0]["batches"]
    cache.file.write_text(json.dumps(content))
    assert cache.load(ATTENTION) == {SHAPE: replace(TUNED, batches={})}
    assert TuningCache(KEY, tmp_path).load(ATTENTION)[SHAPE].choice([SYNCHRONIZED]).max_pieces == {1: 2}


def test_a_measurement_of_fewer_batches_and_contexts_leaves_the_others(tmp_path):
    cache = TuningCache(KEY, tmp_path)
    cache.keep(ATTENTION, {SHAPE: TUNED})
    fewer = {8: times(pieces(2), contexts=(128,)), 16: times(pieces(6))}
    cache.keep(ATTENTION, {SHAPE: replace(TUNED, batches=fewer)})
    [found] = cache.load(ATTENTION).values()
    assert list(found.batches) == [8, 16, 64]
    assert found.batches[8][pieces(2)] == {128: 1.0, 512: 2.0}
    assert found.batches[64] == TUNED.batches[64]


# The measurement


def test_batches_have_the_contexts_that_there_is_memory_for(monkeypatch):
    kernels = resolve_kernels(KernelChoice.REFERENCE)

    def room(num_tokens):
        monkeypatch.setattr(tune_attention, "available_bytes", lambda _: 4 * num_tokens * TOKEN_BYTES)
        return batch_contexts(kernels, SHAPE, (128, 512, 2048))

    assert room(8 * 2048) == {8: [128, 512, 2048], 64: [128]}
    assert room(8 * 2048 - 1) == {8: [128, 512], 64: [128]}
    assert room(8 * 128) == {8: [128]}
    assert room(8 * 128 - 1) == {}
    monkeypatch.setattr(tune_attention, "_MAX_BATCH_BYTES", 64 * 512 * TOKEN_BYTES)
    assert room(10**9) == {8: [128, 512, 2048], 64: [128, 512]}


def test_a_gpu_is_measured_for_batches(monkeypatch):
    properties = SimpleNamespace(multi_processor_count=3)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    monkeypatch.setattr(tune_attention, "available_bytes", lambda _: 4 * 64 * 128 * TOKEN_BYTES)
    monkeypatch.setattr(tune_attention, "measure_queued", lambda *arguments, **_: arguments)
    kernels = replace(resolve_kernels(KernelChoice.REFERENCE), device=torch.device("cuda"))
    *_, choices, sizes = measure_attention(kernels, SHAPE, contexts=(128, 4096), num_threads=2, num_rounds=1)
    assert choices == candidates(kernels.softmax_schemes, 3, (1, 3, 4))
    assert sizes == {1: (128, 4096), 8: [128], 64: [128]}


def test_queued_calls_are_of_whole_batches(monkeypatch):
    """Each attends once in every sequence, to a context of its own, in as many pieces as its choice has."""
    pytest.importorskip("headrace.kernels.cpu", reason="the native module is not built", exc_type=ImportError)
    monkeypatch.setattr(tune_contexts, "_WORKING_SET_BYTES", 0)
    calls = []

    def attention(query, cache, tables, lens, bounds, spec):
        assert tables.shape[1] == -(-lens[0] // 16)
        assert len(set(tables.flatten().tolist())) == tables.numel()
        assert bounds.tolist() == list(range(len(lens) + 1))
        assert len(query) == len(lens)
        pieces = plain.dataflow.max_pieces(len(lens))
        calls.append((lens.tolist(), AttentionChoice(scheme=spec.softmax.scheme, max_pieces=pieces)))
        return plain.attention(query, cache, tables, lens, bounds, spec)

    def timer_of(same, device):
        before = len(calls)
        for call in same:
            call()
        lens, choice = calls[before]
        assert calls[before:] == [(lens, choice)] * len(same)
        return lambda: float(sum(lens) * everyone.index(choice) + 1)

    plain = resolve_kernels(KernelChoice.CPU)
    monkeypatch.setattr(tune_attention, "timer_of", timer_of)
    everyone = candidates(plain.softmax_schemes, 2, (1, 3))
    kernels, sizes = replace(plain, attention=attention), {1: (40, 100), 3: (20,), 5: (7, 33)}
    found = measure_queued(kernels, SHAPE, everyone, sizes, num_rounds=1)
    assert list(found.batches) == [3, 5]
    for num_seqs, contexts in sizes.items():
        measured = found.times if num_seqs == 1 else found.batches[num_seqs]
        assert measured == {
            choice: {n: num_seqs * n * turn + 1.0 for n in contexts} for turn, choice in enumerate(everyone)
        }
    assert plain.dataflow.max_pieces(5) is None
