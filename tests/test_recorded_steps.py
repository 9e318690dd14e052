"""Decode steps recorded for a few sizes and padded to them, as on a GPU, against steps computed as they are."""

import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints import BY_NAME, random_tokens
from tape import TapeRecorder, tape_kernels

from headrace import LLM, SamplingParams
from headrace.engine import decode_step, load_rank
from headrace.engine.rows import Row
from headrace.engine.runner import ModelRunner
from headrace.engine.step_inputs import StepInputs
from headrace.engine.step_sizes import StepSizes, bucket_sizes, exact_sizes
from headrace.kernels import NOT_STORED, Recording
from headrace.kernels.reference import record as run_only

SETTINGS = {"dtype": "float32", "max_num_seqs": 5, "max_num_batched_tokens": 16, "block_size": 4}
PROMPTS = [random_tokens(n, seed=n) for n in (17, 3, 9, 2, 6)]


@pytest.fixture(scope="module", params=["gemma2"])
def folder(request, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models") / request.param
    BY_NAME[request.param].write(folder)
    return folder


@pytest.fixture
def recorder(monkeypatch) -> TapeRecorder:
    recorder = TapeRecorder()
    monkeypatch.setattr(load_rank, "resolve_kernels", lambda *_, **__: tape_kernels(recorder))
    return recorder


def make_llm(folder: Path, **settings) -> LLM:
    return LLM(str(folder), **(SETTINGS | {"num_blocks": 60} | settings))


def tokens(llm: LLM, max_tokens: int = 9) -> list[list[int]]:
    params = [SamplingParams(temperature=0, max_tokens=max_tokens - i) for i in range(len(PROMPTS))]
    prompts = [{"prompt_token_ids": prompt} for prompt in PROMPTS]
    return [output.outputs[0].token_ids for output in llm.generate(prompts, params)]


@pytest.fixture(scope="module")
def expected(folder) -> list[list[int]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HEADRACE_KERNELS", "reference")
        return tokens(make_llm(folder))


class TestSizes:
    def test_a_step_is_padded_to_less_than_twice_its_size(self) -> None:
        for largest in range(1, 300):
            sizes = bucket_sizes(largest)
            assert sizes.buckets[-1] == sizes.largest == largest
            assert list(sizes.buckets) == sorted(set(sizes.buckets))
            for num_seqs in range(1, largest + 1):
                assert num_seqs <= sizes.of(num_seqs) < 2 * num_seqs or sizes.of(num_seqs) == num_seqs
            assert len(sizes.buckets) <= 10

    def test_buckets_are_powers_of_two_up_to_the_last(self) -> None:
        assert bucket_sizes(32).buckets == (1, 2, 4, 8, 16, 32)
        assert bucket_sizes(20).buckets == (1, 2, 4, 8, 16, 20)
        assert bucket_sizes(1).buckets == (1,)

    def test_exact_sizes_are_those_of_the_step(self) -> None:
        assert [exact_sizes().of(n) for n in (1, 7, 64)] == [1, 7, 64]


class TestEngine:
    def test_tokens_are_those_of_steps_computed_as_they_are(self, folder, expected, recorder) -> None:
        llm = make_llm(folder)
        assert tokens(llm) == expected
        assert recorder.num_replays > 8
        assert llm.engine.model.executor.worker.decode_step.obstacle is None

    def test_and_with_preemption(self, folder, expected, recorder) -> None:
        llm = make_llm(folder, num_blocks=11)
        assert tokens(llm) == expected
        assert llm.engine.metrics().num_preemptions > 0

    def test_and_with_prefix_hits(self, folder, expected, recorder) -> None:
        llm = make_llm(folder)
        assert tokens(llm) == tokens(llm) == expected
        assert llm.engine.metrics().prefix_hit_tokens > 0

    def test_all_sizes_are_recorded_at_start_and_none_later(self, folder, expected, recorder) -> None:
        llm = make_llm(folder)
        assert recorder.num_recordings == 2 * 4  # layers and head for 1, 2, 4 and 5 sequences
        tokens(llm)
        assert recorder.num_recordings == 2 * 4

    def test_what_there_is_no_time_for_is_recorded_when_it_is_met(
        self, folder, expected, recorder, monkeypatch, caplog
    ) -> None:
        now = iter(range(0, 1000, 10))
        monkeypatch.setattr(decode_step.time, "monotonic", lambda: float(next(now)))
        llm = make_llm(folder, graph_budget_s=25)
        assert recorder.num_recordings == 2 * 2
        assert "steps of 2, 4 sequences are recorded when they are first met: 25 s were spent" in caplog.text
        monkeypatch.undo()
        assert tokens(llm) == expected
        assert recorder.num_recordings > 2 * 2

    def test_switched_off_no_step_is_recorded(self, folder, expected, recorder, caplog) -> None:
        llm = make_llm(folder, graphs=False)
        assert tokens(llm) == expected
        assert recorder.num_recordings == 0
        assert not [record for record in caplog.records if record.levelno >= logging.WARNING]

    def test_a_model_that_cannot_be_recorded_runs_and_says_so(self, folder, expected, monkeypatch, caplog) -> None:
        recorder = TapeRecorder()
        kernels = replace(tape_kernels(recorder), attention=_attention_that_looks(tape_kernels(recorder).attention))
        monkeypatch.setattr(load_rank, "resolve_kernels", lambda *_, **__: kernels)
        llm = make_llm(folder)
        assert "asked for op by op: aten::item waits" in caplog.text
        assert tokens(llm) == expected
        assert recorder.num_replays == 0


def _attention_that_looks(attention):
    def look(query, kv_cache, block_tables, context_lens, cu_seqlens_q, spec):
        assert context_lens.max().item() >= 0
        return attention(query, kv_cache, block_tables, context_lens, cu_seqlens_q, spec)

    return look


class TestStep:
    """One step at a time, over staged inputs: what ops read is not what the host writes."""

    @pytest.fixture
    def runner(self, folder, recorder) -> ModelRunner:
        runner = make_llm(folder).engine.model.executor.worker._runner
        step, pool = runner.decode_step, runner._kv_pool
        for layer in pool.layers:
            layer.data.fill_(0.5)
        inputs = StepInputs(
            max_num_seqs=5,
            block_size=pool.spec.block_size,
            max_model_len=64,
            share=None,
            device=torch.device("cpu"),
            is_staged=True,
        )
        runner._decode_step = decode_step.DecodeStep(
            runner._decoder.kernels, step._forward, step._head, inputs, step.sizes
        )
        return runner

    def rows(self, num_seqs: int, position: int) -> list[Row]:
        return [Row([7 * i + position], position, np.array([i, i + 9], np.int32)) for i in range(num_seqs)]

    def test_rows_beyond_the_sequences_change_nothing(self, runner) -> None:
        for position in range(6):
            for num_seqs in (3, 5, 1):
                for layer in runner._kv_pool.layers:
                    before = layer.data.clone()
                hidden_states = runner.run(self.rows(num_seqs, position)).clone()
                assert len(hidden_states) == num_seqs
                logits, largest = runner.logits(runner.run(self.rows(num_seqs, position)))
                assert len(largest.token_ids) == len(logits) == num_seqs
                assert largest.token_ids.tolist() == logits.argmax(1).tolist()
                changed = (runner._kv_pool.layers[-1].data != before).any(-1).any(-1).flatten(1).any(0)
                blocks = {int(slot) // 4 for slot in changed.nonzero()}
                tables = [row.block_table[position // 4] for row in self.rows(num_seqs, position)]
                assert blocks <= set(map(int, tables))

    def test_a_size_does_not_matter(self, runner) -> None:
        whole = runner.run(self.rows(5, 0)).clone()
        assert whole.isfinite().all()
        for num_seqs in (1, 2, 3, 4):
            part = runner.run(self.rows(num_seqs, 0))
            torch.testing.assert_close(part, whole[:num_seqs], rtol=1e-3, atol=1e-3)

    def test_a_size_that_ranks_have_given_up_runs_as_the_next_one(self, runner) -> None:
        step, rows = runner.decode_step, self.rows(3, 0)
        step.record(1e9)
        expected = runner.next_logits(rows).logits.clone()
        answers = iter((True, True, False))
        assert step.record(1e9, all_agree=lambda _: next(answers)) == (1, 2, 4)
        host = step.inputs.arrays.host
        host["context_lens"][:] = 7
        torch.testing.assert_close(runner.next_logits(rows).logits, expected, rtol=1e-3, atol=1e-3)
        assert host["context_lens"].tolist() == [1, 1, 1, 0, 0]

    def test_nothing_but_what_was_sent_is_read(self, runner, monkeypatch) -> None:
        """Whatever the host holds is overwritten as soon as it is sent."""
        expected = [runner.run(self.rows(n, 2)).clone() for n in (2, 5, 3)]
        inputs, send = runner.decode_step.inputs, runner.decode_step.inputs.arrays.send

        def send_and_forget(**how) -> None:
            send(**how)
            for name, array in inputs.arrays.host.items():
                if name != "cu_seqlens_q":
                    array[...] = -(2**30)
            # Tables are kept by the host and would be sent again as they are now.
            inputs._written_tables = [None] * len(inputs._written_tables)

        monkeypatch.setattr(inputs.arrays, "send", send_and_forget)
        for n, hidden_states in zip((2, 5, 3), expected, strict=True):
            torch.testing.assert_close(runner.run(self.rows(n, 2)), hidden_states)

    def test_tables_are_sent_when_they_have_changed(self, runner, monkeypatch) -> None:
        inputs = runner.decode_step.inputs
        sent: list[object] = []
        send = inputs.arrays.send
        monkeypatch.setattr(inputs.arrays, "send", lambda **how: (sent.append(how), send(**how)))
        rows = self.rows(3, 0)
        moved = [rows[0], rows[1]._replace(block_table=np.array([8, 4], np.int32)), rows[2]]
        for step in (rows, rows, moved, moved, rows):
            runner.run(step)
        kinds = [how.get("num_rows") for how in sent]
        assert kinds == [4, None, 4, None, 4]
        assert inputs.arrays.device["block_tables"][:3, 0].tolist() == [0, 1, 2]

    def test_padding_stands_for_nobody(self, runner) -> None:
        runner.run(self.rows(5, 7))
        runner.run(self.rows(3, 7))
        batch = runner.decode_step.inputs.batch(4)
        assert batch.slot_mapping[3] == NOT_STORED
        assert batch.context_lens.tolist() == [8, 8, 8, 0]
        assert batch.cu_seqlens_q.tolist() == [0, 1, 2, 3, 4]

    def test_it_says_how_many_rows_it_computes(self, runner) -> None:
        assert [runner.num_rows(n, n) for n in range(1, 6)] == [1, 2, 4, 4, 5]
        assert runner.num_rows(9, 3) == 9
        runner.decode_step._layers[4] = replace_recording(runner.decode_step._record_layers(4))
        assert runner.num_rows(3, 3) == 3


def replace_recording(layers):
    return replace(layers, recording=Recording(obstacle="none"))


def test_steps_of_their_own_size_are_not_recorded_beforehand() -> None:
    inputs = StepInputs(max_num_seqs=4, block_size=4, max_model_len=8, share=None, device=torch.device("cpu"))
    kernels = replace(tape_kernels(TapeRecorder()), record=run_only)
    step = decode_step.DecodeStep(kernels, lambda batch: batch.input_ids, None, inputs, StepSizes(largest=4))
    assert step.record(1e9) == ()
    assert not step._layers
