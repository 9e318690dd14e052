"""Decode steps replayed against the same computed op by op, with the native kernels."""

import numpy as np
import pytest
import torch
from tiny_model import write_tiny_model

from headrace import LLM
from headrace.engine import decode_step as module
from headrace.engine.rows import Row, build_forward_batch
from headrace.engine.runner import ModelRunner

pytest.importorskip("headrace.kernels.cpu", reason="the native module is not built", exc_type=ImportError)


@pytest.fixture
def runner(tmp_path) -> ModelRunner:
    return LLM(str(write_tiny_model(tmp_path / "tiny")), num_blocks=32).engine.model.executor.worker._runner


def rows(num_seqs: int, position: int) -> list[Row]:
    """Each sequence has a block of its own."""
    return [Row([7 * i + position], position, np.array([i], dtype=np.int32)) for i in range(num_seqs)]


def run(runner: ModelRunner, num_seqs: int, position: int) -> tuple[torch.Tensor, np.ndarray, np.ndarray]:
    logits, largest = runner.logits(runner.run(rows(num_seqs, position)))
    assert largest is not None
    return logits.clone(), np.array(largest.token_ids), np.array(largest.logits)


def test_replayed_logits_are_those_of_the_head(runner) -> None:
    for position in range(4):
        for num_seqs in (1, 3, 2):
            hidden_states = runner.run(rows(num_seqs, position))
            expected = runner._decoder.compute_logits(hidden_states)
            logits, largest = runner.logits(hidden_states)
            assert torch.equal(logits, expected)
            assert largest.token_ids.tolist() == expected.argmax(1).tolist()
            assert largest.logits.tolist() == expected.max(1).values.tolist()
    assert runner.decode_step.obstacle is None


def test_rows_that_were_picked_out_are_computed_anew(runner) -> None:
    whole = runner.logits(runner.run(rows(3, 0))).logits.clone()
    logits, largest = runner.logits(runner.run(rows(3, 0))[[0, 2]])
    assert largest is None
    assert torch.equal(logits, whole[[0, 2]])


def test_a_prompt_of_as_many_tokens_is_not_taken_for_the_last_step(runner) -> None:
    run(runner, 3, 0)
    hidden_states = runner.run([Row([1, 2, 3], 0, np.array([5], dtype=np.int32))])
    logits, largest = runner.logits(hidden_states)
    assert largest is None
    assert torch.equal(logits, runner._decoder.compute_logits(hidden_states))


def test_logits_of_a_step_that_was_forgotten_are_computed_anew(runner) -> None:
    """Its head was recorded over buffers that the next recording of that size does not write to."""
    for _ in range(2):
        hidden_states = runner.run(rows(2, 0))
    expected = runner.logits(hidden_states).logits.clone()
    runner.decode_step.forget()
    logits, largest = runner.logits(hidden_states)
    assert largest is None
    assert torch.equal(logits, expected)
    for position in (1, 2):
        hidden_states = runner.run(rows(2, position))
        assert torch.equal(runner.logits(hidden_states).logits, runner._decoder.compute_logits(hidden_states))


def test_logits_of_many_sizes_are_kept_within_bounds(runner, monkeypatch) -> None:
    """Recordings come and go with the size of the batch; what they compute stays."""
    vocab_size = runner._decoder.config.vocab_size
    monkeypatch.setattr(module, "_MAX_KEPT_LOGITS_BYTES", 5 * 4 * vocab_size)
    first = {num_seqs: run(runner, num_seqs, 0) for num_seqs in (1, 2, 3, 4)}
    for num_seqs in (4, 1, 3, 2, 2, 1):
        for expected, found in zip(first[num_seqs], run(runner, num_seqs, 0), strict=True):
            np.testing.assert_array_equal(expected, found)
        kept = sum(head.logits.shape[0] for head in runner.decode_step._heads.values())
        assert kept <= 5


def test_steps_from_rows_to_logits_in_one_go_outlive_no_recording(runner, monkeypatch) -> None:
    """They are made of layers and heads, which are forgotten all at once, and heads one by one to make room."""
    vocab_size = runner._decoder.config.vocab_size
    monkeypatch.setattr(module, "_MAX_KEPT_LOGITS_BYTES", 5 * 4 * vocab_size)
    for position, num_seqs in enumerate((1, 3, 3, 1, 1, 3, 2, 2, 3, 3, 2, 1, 1)):
        expected = runner._decoder.compute_logits(runner.run(rows(num_seqs, position))).clone()
        logits, largest = runner.next_logits(rows(num_seqs, position))
        assert torch.equal(logits, expected)
        assert list(largest.token_ids) == expected.argmax(1).tolist()
        assert list(largest.logits) == expected.max(1).values.tolist()
        if position == 8:
            runner.decode_step.forget()
            assert runner.decode_step.run_to_logits(rows(num_seqs, position)) is None
        assert sum(runner.decode_step._whole) <= 5


def test_a_head_that_torch_takes_part_in_is_not_replayed(runner) -> None:
    """Gemma 2 caps its logits in torch; its layers are replayed all the same."""
    runner._decoder.lm_head._soft_cap = 2.0
    capped = [runner.logits(runner.run(rows(2, position))).logits for position in range(3)]
    assert all(logits.abs().max() <= 2.0 for logits in capped)
    assert "torch" in runner.decode_step.obstacle
    assert runner.logits(runner.run(rows(2, 3))).largest is None


def test_a_row_follows_its_sequence_to_other_blocks(runner) -> None:
    """Tables are copied when they change only: a longer one, another one of the same length, the first one again."""
    tables = [np.array(ids, dtype=np.int32) for ids in ([3], [3, 9], [4], [3, 8])]
    block_size = runner._kv_pool.spec.block_size
    for token_id, table in enumerate((*tables, tables[1], tables[0]), start=5):
        row = Row([token_id], len(table) * block_size - 1, table)
        replayed = runner.run([row]).clone()
        assert torch.equal(replayed, runner._forward(build_forward_batch([row], block_size)))
