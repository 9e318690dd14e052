"""Prompts by the library's attention, over keys and values gathered from the paged cache, against float64."""

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from triton_attention_problem import assert_right, make_problem, make_spec
from triton_device import DEVICE

from headrace.config import KvCacheFormat, SoftmaxScheme
from headrace.kernels.dataflow import Dataflow
from headrace.kernels.triton import attention, attention_library
from headrace.kernels.triton.attention import Attention
from headrace.kernels.triton.attention_library import LibraryPrefill

pytestmark = pytest.mark.usefixtures("poisoned_memory")

MIXED = ((150, 1), (70, 40), (3, 3), (40, 2), (33, 33))
"""A token to decode, a chunk of a prompt, whole ones, and two tokens at once."""


def run(problem, spec, *, library_from=1):
    dataflow = Dataflow()
    dataflow.prefill_library_from = library_from
    return Attention(DEVICE, dataflow)(*problem.arguments(), spec)


@pytest.fixture
def _without_the_kernel(monkeypatch):
    monkeypatch.setattr(attention, "prefill_kernel", None)


@pytest.fixture
def _without_the_library(monkeypatch):
    monkeypatch.setattr(LibraryPrefill, "__call__", None)


@pytest.mark.usefixtures("_without_the_kernel")
class TestResults:
    @pytest.mark.parametrize(
        ("cache_format", "dtype", "window"),
        [
            (KvCacheFormat.BFLOAT16, torch.bfloat16, None),
            (KvCacheFormat.INT8, torch.bfloat16, 37),
            (KvCacheFormat.INT8, torch.float16, None),
            (KvCacheFormat.FLOAT32, torch.float16, 5),
        ],
    )
    def test_batches_of_both_kinds(self, cache_format, dtype, window):
        problem = make_problem(MIXED, dtype=dtype, cache_format=cache_format, num_kv_heads=1)
        spec = make_spec(sliding_window=window)
        assert_right(run(problem, spec), problem, spec)

    @pytest.mark.parametrize(
        ("head_dim", "num_kv_heads", "group", "block_size"), [(80, 3, 1, 8), (128, 1, 8, 32), (96, 1, 3, 24)]
    )
    def test_heads_and_blocks(self, head_dim, num_kv_heads, group, block_size):
        lens = ((45, 45), (133, 9))
        shape = {"head_dim": head_dim, "num_kv_heads": num_kv_heads, "group": group, "block_size": block_size}
        problem = make_problem(lens, dtype=torch.float16, **shape)
        assert_right(run(problem, make_spec(head_dim=head_dim)), problem, make_spec(head_dim=head_dim))
        one = problem.only(0)
        assert_right(run(one, make_spec(head_dim=head_dim)), one, make_spec(head_dim=head_dim))

    def test_queries_among_keys_and_values(self):
        problem = make_problem(((33, 9),), dtype=torch.float16, num_kv_heads=1)
        fused = torch.full((9, 6, 64), torch.nan, dtype=torch.float16, device=DEVICE)
        fused[:, 1:5] = problem.query
        _, *rest = problem.arguments()
        dataflow = Dataflow()
        dataflow.prefill_library_from = 9
        actual = Attention(DEVICE, dataflow)(fused[:, 1:5], *rest, make_spec())
        assert torch.equal(actual, run(problem, make_spec()))


@pytest.mark.skipif(DEVICE.type != "cpu", reason="what was gathered is looked at where the interpreter runs")
def test_a_bad_token_of_an_int8_cache_hides_behind_its_key(monkeypatch):
    """A weight of 0 times a value that is not a number would reach those who do not see it."""
    gathered = []
    monkeypatch.setattr(attention_library, "_by_sequence", lambda *args: gathered.append(args))
    problem = make_problem(((40, 20), (30, 1)), dtype=torch.float16, cache_format=KvCacheFormat.INT8)
    block, offset = divmod(int(problem.slots(0)[30]), 16)
    problem.cache.scales[:, block, 1, offset] = torch.nan
    sizes = {"max_tokens": 2, "softmax_scale": 0.1, "sliding_window": None}
    LibraryPrefill(DEVICE)(*problem.arguments(), **sizes)
    [(_, keys, values, _, bounds, *_)] = gathered
    assert bounds.tolist() == [0, 40, 40], "what is decoded is not gathered"
    assert keys[30, 1].isnan().all()
    assert torch.equal(values[30, 1], torch.zeros(64, dtype=torch.float16))
    keys[30, 1] = 0.0
    assert keys[:40].isfinite().all()
    assert values[:40].isfinite().all()


@pytest.mark.usefixtures("_without_the_library")
class TestWhatTheKernelKeeps:
    @pytest.mark.parametrize(
        ("scheme", "cap"),
        [(SoftmaxScheme.LAZY, None), (SoftmaxScheme.ASYNCHRONIZED, None), (SoftmaxScheme.SYNCHRONIZED, 2.0)],
    )
    def test_other_softmaxes(self, scheme, cap):
        problem = make_problem(((33, 9),), dtype=torch.float16, num_kv_heads=1)
        spec = make_spec(scheme, logit_soft_cap=cap)
        assert_right(run(problem, spec), problem, spec)

    def test_what_the_library_has_no_heads_for(self):
        problem = make_problem(((33, 9),), dtype=torch.float16, num_kv_heads=1, head_dim=20)
        assert_right(run(problem, make_spec(head_dim=20)), problem, make_spec(head_dim=20))

    @pytest.mark.parametrize("library_from", [10, None])
    def test_steps_for_which_it_was_measured_to_be_slower(self, library_from):
        problem = make_problem(((33, 9),), dtype=torch.float16, num_kv_heads=1)
        assert_right(run(problem, make_spec(), library_from=library_from), problem, make_spec())

    def test_more_than_the_buffer_holds(self, monkeypatch):
        problem = make_problem(((33, 9),), dtype=torch.float16, num_kv_heads=1)
        monkeypatch.setattr(attention_library, "BUFFER_BYTES", 2**12)
        assert_right(run(problem, make_spec()), problem, make_spec())

    def test_more_sequences_than_it_is_launched_for(self):
        problem = make_problem(((3, 3),) * (attention_library.MAX_SEQS + 1), dtype=torch.float16, num_kv_heads=1)
        assert_right(run(problem, make_spec()), problem, make_spec())

    def test_decoding(self):
        problem = make_problem(((33, 1), (20, 1)), dtype=torch.float16, num_kv_heads=1)
        assert_right(run(problem, make_spec()), problem, make_spec())

    @pytest.mark.parametrize(("library_from", "is_held"), [(10**6, True), (None, False)])
    def test_its_buffer_is_held_before_it_is_needed(self, library_from, is_held):
        """Else the KV cache would take its room."""
        problem = make_problem(((20, 1),), num_kv_heads=1)
        dataflow = Dataflow()
        dataflow.prefill_library_from = library_from
        attend = Attention(DEVICE, dataflow)
        attend(*problem.arguments(), make_spec())
        assert (attend._library._buffer is not None) == is_held
