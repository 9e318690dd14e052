"""Traces: what Perfetto is given, and that a real run's trace accounts for its steps and exchanges."""

import json
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace import LLM, SamplingParams
from headrace.cli.main import main
from headrace.costs.sites import Phase
from headrace.demo_model import demo_model_path
from headrace.engine.trace import RankTrace, StepEvent, compute_intervals, write_trace
from headrace.parallel.ledger import ExchangeEvent


def step(number: int, start_ns: int, end_ns: int) -> StepEvent:
    return StepEvent(number, Phase.DECODE, 1, 1, start_ns, end_ns)


def exchange(start_ns: int, end_ns: int, arrival_ns: int | None = None) -> ExchangeEvent:
    return ExchangeEvent(
        operation="all_reduce",
        group="tp",
        site="layers.0.mlp",
        phase=Phase.DECODE,
        algorithm="direct",
        payload_bytes=8,
        wire_bytes=8,
        start_ns=start_ns,
        arrival_ns=arrival_ns,
        end_ns=end_ns,
    )


@given(st.lists(st.integers(1, 20), min_size=2, max_size=60))
def test_compute_is_what_steps_do_not_exchange(gaps):
    """Steps one after the other, exchanges inside them: every nanosecond of a step is one or the other, once."""
    times = [0]
    for gap in gaps:
        times.append(times[-1] + gap)
    half = len(times) // 2
    steps = [step(0, times[0], times[half]), step(1, times[half], times[-1])]
    inner = [(a, b) for index, (a, b) in enumerate(pairwise(times)) if index % 3 == 1]
    found = list(compute_intervals(steps, [exchange(a, b) for a, b in inner]))
    covered = sorted([*found, *inner])
    assert sum(b - a for a, b in covered) == times[-1]
    assert all(b <= c for (_, b), (c, _) in pairwise(covered))


def test_two_hosts_are_put_on_one_clock(tmp_path):
    ranks = [
        RankTrace(name="rank 0", steps=[step(1, 1000, 5000)], exchanges=[exchange(2000, 3000, 2500)]),
        RankTrace(name="rank 1", steps=[step(1, 91000, 95000)], exchanges=[], host_offset_ns=90000),
    ]
    write_trace(ranks, tmp_path / "trace.json")
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    steps = {e["pid"]: (e["ts"], e["dur"]) for e in events if e["name"] == "decode step"}
    assert steps == {0: (0.0, 4.0), 1: (0.0, 4.0)}
    [wait] = [e for e in events if e["name"] == "wait"]
    assert (wait["ts"], wait["dur"]) == (1.0, 0.5)


def test_a_trace_survives_the_way_to_rank_0():
    trace = RankTrace(name="rank 3", steps=[step(1, 2, 3)], exchanges=[exchange(4, 5)], num_dropped=2)
    data = json.loads(json.dumps(trace.to_data()))
    again = RankTrace.from_data(data, host_offset_ns=0)
    assert (again.steps, again.exchanges, again.num_dropped) == (trace.steps, trace.exchanges, 2)


@pytest.mark.parametrize("transport", ["shm", "gloo"])
def test_a_trace_has_every_step_and_exchange_of_every_rank(transport):
    with LLM(str(demo_model_path()), tensor_parallel_size=2, num_threads=1, transport=transport) as llm:
        executor = llm.engine.model.executor
        before = [sum(row.count for row in rows) for rows in executor.ledger_rows()]
        executor.start_trace()
        llm.generate({"prompt_token_ids": list(range(5, 25))}, SamplingParams(temperature=0, max_tokens=6))
        traces = executor.take_traces()
        after = [sum(row.count for row in rows) for rows in executor.ledger_rows()]
    assert [trace.name for trace in traces] == ["rank 0", "rank 1"]
    num_steps = llm.engine.metrics().num_steps
    for trace, first, last in zip(traces, before, after, strict=True):
        assert len(trace.steps) == num_steps
        assert len(trace.exchanges) == last - first > 0
        for event in trace.exchanges:
            assert any(s.start_ns <= event.start_ns <= event.end_ns <= s.end_ns for s in trace.steps)
    # Both see the same exchanges at the same time: no call of one ends before the other's has begun.
    for mine, its in zip(*(trace.exchanges for trace in traces), strict=True):
        assert (mine.site, mine.payload_bytes) == (its.site, its.payload_bytes)
        assert mine.start_ns < its.end_ns
        assert its.start_ns < mine.end_ns


def test_generate_writes_a_trace(tmp_path, capfd):
    file = tmp_path / "trace.json"
    assert main(["generate", "What is the largest ocean?", "--tp", "2", "--threads", "1", "--trace", str(file)]) == 0
    assert "Pacific" in capfd.readouterr().out
    events = json.loads(file.read_text())["traceEvents"]
    names = {(e["pid"], e["name"]) for e in events if e["ph"] == "X"}
    for rank in range(2):
        assert {(rank, "prefill step"), (rank, "decode step"), (rank, "compute"), (rank, "all_reduce")} <= names


def test_a_trace_that_cannot_be_written_is_refused(tmp_path, capfd):
    assert main(["generate", "Hello", "--trace", str(tmp_path / "missing" / "trace.json")]) == 2
    assert "No such file or directory" in capfd.readouterr().err
