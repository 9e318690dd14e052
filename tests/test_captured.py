"""Ledgers of passes that are recorded once and replayed often."""

import threading
from collections import Counter
from dataclasses import replace

import pytest
import recorded_rank
import torch
from checkpoints import BY_NAME
from layout_cases import (
    CROWDED,
    GREEDY,
    LAYOUTS,
    ORDER,
    PROMPTS,
    as_prompts,
    closing,
    make_subject,
    tokens_of,
)
from planned_run import assert_ledgers_as_predicted, record_plans
from recorded_kernels import record, with_padded_recordings, with_recordings
from thread_group import on_ranks, thread_groups
from thread_world import thread_llm

from headrace import LLM
from headrace.config import Transport
from headrace.config.settings import parallel_config
from headrace.costs.exchanges import rules_of
from headrace.costs.sites import Phase
from headrace.engine import decode_step, load_rank, start
from headrace.engine.worker import Worker
from headrace.kernels import Recording
from headrace.parallel.captured import captured, counting_record
from headrace.parallel.exchange_counts import Call, ExchangeCounts
from headrace.parallel.group import OneRankGroup

SUM = Call("all_reduce", "ring", "layers.0.mlp", 64, 96)
SEND = Call("send", "point_to_point", "boundary.0", 32, 32)


def counted(counts: ExchangeCounts) -> dict[tuple[str, Phase], tuple[int, int, int]]:
    return {(row.operation, row.phase): (row.count, row.payload_bytes, row.wire_bytes) for row in counts.rows()}


class TestCounts:
    def test_captured_calls_are_noted_and_not_counted(self) -> None:
        counts = ExchangeCounts("tp")
        counts.add(SUM)
        with counts.captured() as notes:
            counts.add(SUM)
            counts.add(SUM)
            counts.add(SEND)
        assert notes == Counter({SUM: 2, SEND: 1})
        assert counted(counts) == {("all_reduce", Phase.PREFILL): (1, 64, 96)}

    def test_a_replay_counts_in_the_phase_it_runs_in(self) -> None:
        counts = ExchangeCounts("tp")
        with counts.captured() as notes:
            counts.add(SUM)
            counts.add(SUM)
        counts.phase = Phase.DECODE
        for _ in range(3):
            counts.count(notes)
        assert counted(counts) == {("all_reduce", Phase.DECODE): (6, 6 * 64, 6 * 96)}

    def test_a_replay_within_a_capture_is_noted(self) -> None:
        """As where a whole start is for trial: whatever is recorded and replayed in it."""
        counts = ExchangeCounts("tp")
        with counts.captured() as outer:
            with counts.captured() as inner:
                counts.add(SEND)
            counts.count(inner)
            counts.add(SUM)
        assert outer == Counter({SEND: 1, SUM: 1})
        assert not counts.rows()

    def test_a_failed_capture_leaves_the_ledger_counting(self) -> None:
        counts = ExchangeCounts("tp")
        with pytest.raises(ZeroDivisionError), counts.captured():
            counts.add(SUM)
            1 / 0  # noqa: B018
        counts.add(SUM)
        assert counted(counts) == {("all_reduce", Phase.PREFILL): (1, 64, 96)}


class TestRecordings:
    def test_the_first_pass_counts_once_and_each_replay_once(self) -> None:
        groups = thread_groups(2)

        def run(group):
            out, recording = counting_record(record, [group])(lambda: group.all_reduce(torch.ones(4), "a"))
            group.set_phase(Phase.PREFILL)
            for _ in range(5):
                recording.replay()
            return out

        for out in on_ranks(groups, run):
            assert out.tolist() == [2.0] * 4
        for group in groups:
            rows = {row.phase: (row.count, row.payload_bytes, row.wire_bytes) for row in group.ledger_rows()}
            assert rows == {Phase.DECODE: (1, 16, 16), Phase.PREFILL: (5, 80, 80)}

    def test_a_pass_that_cannot_be_recorded_counts_as_it_runs(self) -> None:
        groups = thread_groups(2)

        def refuse(forward):
            return forward(), Recording(obstacle="none of your business")

        def run(group):
            forward = lambda: group.all_reduce(torch.ones(4), "a")
            _, recording = counting_record(refuse, [group])(forward)
            forward()
            return recording

        assert {recording.obstacle for recording in on_ranks(groups, run)} == {"none of your business"}
        assert {row.count for group in groups for row in group.ledger_rows()} == {2}

    @pytest.mark.parametrize(("fails_in", "count"), [(1, 1), (2, 2)], ids=["first pass", "capture"])
    def test_what_was_exchanged_before_a_failure_is_counted(self, fails_in, count) -> None:
        """A capture exchanges nothing, so that one cut short leaves the pass that came before it."""
        groups = thread_groups(2)

        def run(group):
            calls = []

            def forward():
                calls.append(None)
                group.all_reduce(torch.ones(4), "a")
                if len(calls) == fails_in:
                    raise ZeroDivisionError
                group.all_reduce(torch.ones(4), "b")

            def capture(forward):
                return forward(), forward()

            with pytest.raises(ZeroDivisionError):
                counting_record(capture, [group])(forward)

        on_ranks(groups, run)
        for group in groups:
            assert sum(row.count for row in group.ledger_rows()) == count

    def test_a_trial_run_counts_nothing(self) -> None:
        groups = thread_groups(2)

        def run(group):
            forward = lambda: group.all_reduce(torch.ones(4), "a")
            with captured([group]):
                _, recording = counting_record(record, [group])(forward)
                recording.replay()
            before = group.ledger_rows()
            recording.replay()
            return before

        assert on_ranks(groups, run) == [[], []]
        assert {row.count for group in groups for row in group.ledger_rows()} == {1}

    def test_without_other_ranks_nothing_stands_between(self) -> None:
        assert counting_record(record, [OneRankGroup(), OneRankGroup("pp")]) is record

    def test_groups_are_counted_apart(self) -> None:
        tp, pp = thread_groups(2), thread_groups(2, "pp")

        def run(group):
            rank = group.rank

            def forward():
                total = tp[rank].all_reduce(torch.ones(4), "a")
                return torch.cat(pp[rank].all_gather(total[: 2 * rank + 1].clone(), "b", [1, 3]))

            _, recording = counting_record(record, [tp[rank], OneRankGroup("kv"), pp[rank]])(forward)
            recording.replay()

        on_ranks(tp, run)
        for rank in range(2):
            assert [(row.count, row.payload_bytes) for row in tp[rank].ledger_rows()] == [(2, 32)]
            assert [(row.count, row.payload_bytes) for row in pp[rank].ledger_rows()] == [(2, 2 * 4 * (2 * rank + 1))]


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return make_subject(BY_NAME["llama-gqa"], tmp_path_factory.mktemp("llama-gqa"))


def assert_replayed_run(llm: LLM, subject, settings) -> None:
    plans = record_plans(llm)
    outputs = llm.generate(as_prompts(PROMPTS[i] for i in ORDER), GREEDY)
    assert tokens_of(outputs) == [subject.tokens[i] for i in ORDER]
    executor, model = llm.engine.model.executor, llm.engine.model.config
    rules = rules_of(Transport.GLOO)
    assert_ledgers_as_predicted(executor.ledger_rows(), plans, model, parallel_config(**settings), rules)


@pytest.mark.parametrize(
    "flags", [(), ("send_residual", "slice_boundary", "shard_embedding")], ids=["plain", "literal"]
)
@pytest.mark.parametrize("layout", ["tp2", "tp4", "pp2", "tp2-pp2"])
def test_replayed_decode_steps_exchange_what_is_predicted(llama, layout, flags) -> None:
    settings = CROWDED | LAYOUTS[layout] | dict.fromkeys(flags, True)
    with closing(thread_llm(llama.folder, change_kernels=with_recordings, **settings)) as llm:
        assert_replayed_run(llm, llama, settings)
        for worker in llm.engine.model.executor.workers:
            assert worker.decode_step._layers
            assert worker.decode_step.obstacle is None
            assert not worker.exchange_differences()


@pytest.mark.parametrize(("layout", "num_stages"), [("tp2", 1), ("tp2-pp2", 2)])
def test_padded_decode_steps_exchange_what_is_predicted(llama, layout, num_stages) -> None:
    """Steps of 3 sequences run as 4, and exchange as much. What is recorded at start is nobody's request."""
    settings = CROWDED | LAYOUTS[layout] | {"max_num_seqs": 4 * num_stages, "num_blocks": 48}
    with closing(thread_llm(llama.folder, change_kernels=with_padded_recordings, **settings)) as llm:
        workers = llm.engine.model.executor.workers
        assert not any(worker.ledger_rows() for worker in workers)
        plans = record_plans(llm)
        llm.generate(as_prompts(PROMPTS * num_stages), GREEDY)
        decoded = [plan.num_tokens for plan in plans if plan.num_decode_tokens == plan.num_tokens > 0]
        assert 3 in decoded
        sizes = {1: 1, 2: 2, 3: 4, 4: 4, 5: 8, 6: 8}
        for worker in workers:
            assert not worker.exchange_differences()
            sums = [
                row
                for row in worker.ledger_rows()
                if row.operation == "all_reduce" and row.phase is Phase.DECODE and row.site.endswith(".mlp")
            ]
            hidden_size = llm.engine.model.config.hidden_size
            assert {row.count for row in sums} == {len(decoded)}
            assert {row.payload_bytes for row in sums} == {sum(sizes[n] for n in decoded) * 4 * hidden_size}


def test_padded_logits_that_are_gathered_exchange_what_is_predicted(llama) -> None:
    """Each rank gets all rows of the recorded head, those that fill the step up too."""
    sizes, _ = padded_run(llama, with_padded_recordings, layout="tp2", gather_logits=True)
    assert sizes == [(1, 2, 4, 8)] * 2


def padded_run(subject, change_kernels, layout="tp2-pp2", **settings) -> tuple[list[tuple[int, ...]], list[Worker]]:
    """The sizes that each rank has recorded, after a run whose ledgers are as predicted, and its workers."""
    settings = CROWDED | LAYOUTS[layout] | {"max_num_seqs": 8, "num_blocks": 48} | settings
    with closing(thread_llm(subject.folder, change_kernels=change_kernels, **settings)) as llm:
        workers = llm.engine.model.executor.workers
        outputs = llm.generate(as_prompts(PROMPTS), GREEDY)
        assert tokens_of(outputs) == subject.tokens
        for worker in workers:
            assert not worker.exchange_differences()
            assert set(worker.decode_step._layers) == set(worker.decode_step.sizes.buckets)
        return [worker.decode_step.sizes.buckets for worker in workers], workers


class Clock:
    """Stops at the first rank's third look at it."""

    def __init__(self) -> None:
        self._looks: Counter[int] = Counter()
        self.first = None

    def monotonic(self) -> float:
        me = threading.get_ident()
        self.first = self.first or me
        self._looks[me] += 1
        return 1e6 if me == self.first and self._looks[me] > 3 else 0.0


def test_ranks_stop_recording_together(llama, monkeypatch, caplog) -> None:
    """One is slower than its budget: none records another size, and steps of what is left run as the next size."""
    with monkeypatch.context() as patch:
        patch.setattr(decode_step, "time", Clock())
        sizes, _ = padded_run(llama, with_padded_recordings)
    assert sizes == [(1, 8)] * 4
    assert "steps of 2, 4 sequences are filled up to a size that is recorded (1, 8): 60 s were spent" in caplog.text


def test_without_time_no_rank_records_anything(llama, caplog) -> None:
    sizes, _ = padded_run(llama, with_padded_recordings, graph_budget_s=0)
    assert sizes == [()] * 4
    assert "steps of 1, 2, 4, 8 sequences are asked for op by op: 0 s were spent" in caplog.text


def test_what_one_rank_cannot_record_no_rank_replays(llama, caplog) -> None:
    """One that exchanges op by op would wait for ever for one that replays."""
    ranks = iter(range(4))

    def refuse(forward):
        return record(forward)[0], Recording(obstacle="every op is called")

    def first_cannot(kernels):
        recordable = with_padded_recordings(kernels)
        return replace(recordable, record=refuse) if next(ranks) == 0 else recordable

    sizes, workers = padded_run(llama, first_cannot)
    assert sizes == [()] * 4
    assert "are asked for op by op: every op is called" in caplog.text
    assert "are asked for op by op: another rank cannot record them" in caplog.text
    obstacles = Counter(worker.decode_step.obstacle for worker in workers)
    assert obstacles == {"every op is called": 1, "another rank cannot record them": 3}


def test_replayed_decode_steps_of_processes(llama, monkeypatch) -> None:
    settings = CROWDED | LAYOUTS["tp2-pp2"] | {"transport": "gloo"}
    monkeypatch.setattr(start, "_RANK_MODULE", recorded_rank.__name__)
    monkeypatch.setattr(load_rank, "resolve_kernels", load_rank.resolve_kernels)
    recorded_rank.record_decode_steps()
    with closing(LLM(str(llama.folder), dtype="float32", **settings)) as llm:
        assert_replayed_run(llm, llama, settings)
        assert llm.engine.model.executor.worker.decode_step.obstacle is None
        assert llm.engine.model.executor.exchange_differences() == []
