"""What an engine says of itself: counters against what known requests must give, bytes predicted against counted."""

import os
import signal
import time
from dataclasses import replace
from itertools import chain, count
from types import SimpleNamespace

import psutil
import pytest
from checkpoints import HAS_NATIVE
from engine_clock import set_engine_clock
from layout_cases import LAYOUTS, closing
from planned_run import record_plans, run_of
from thread_world import thread_llm

from headrace import LLM, SamplingParams
from headrace.config import Transport
from headrace.config.settings import parallel_config
from headrace.costs.exchanges import Layout, rules_of
from headrace.costs.volume import predict_run, totals_of
from headrace.demo_model import demo_model_path
from headrace.engine.engine import Engine
from headrace.engine.exchange_check import ExchangeCheck
from headrace.engine.metrics import EngineStatistics
from headrace.engine.outputs import RequestOutput
from headrace.errors import RankError, RequestError

SETTINGS = {"num_threads": 1, "max_model_len": 256}
GREEDY = SamplingParams(temperature=0, max_tokens=7, ignore_eos=True)


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM(str(demo_model_path()), **SETTINGS)


class TestTimes:
    def test_a_token_knows_how_long_after_its_output_s_last_one_it_came(self, llm, monkeypatch):
        """Steps take 1, 2, 4, ... s by a clock that stands still otherwise. The second output waits a step for the
        first one's prompt."""
        clock = SimpleNamespace(now_s=0.0)
        set_engine_clock(monkeypatch, lambda: clock.now_s)
        llm.engine.add_request("a", range(5, 25), replace(GREEDY, n=2))
        latencies_s: dict[int, list[float | None]] = {0: [], 1: []}
        first_s = []
        for step in count():
            if not llm.engine.has_unfinished:
                break
            clock.now_s += 2.0**step
            for update in llm.engine.step():
                for chunk in update.chunks:
                    latencies_s[chunk.index].append(chunk.itl_s)
                    first_s.append(chunk.ttft_s)
        assert latencies_s == {0: [None, 2, 4, 8, 16, 32, 64], 1: [None, 4, 8, 16, 32, 64, 128]}
        assert first_s == [1.0, *[None] * 13]


class TestCounters:
    def test_are_what_known_requests_must_give(self, llm):
        """Two blocks of one prompt are found by its second run; n outputs are one prompt; an abort keeps its tokens."""
        engine = Engine(llm.engine.model)
        block_size = engine.model.plan.cache.block_size
        prompt = list(range(5, 5 + 2 * block_size + 3))
        run(engine, {"a": (prompt, GREEDY)})
        run(engine, {"b": (prompt, replace(GREEDY, n=2, max_tokens=4)), "c": ([9], replace(GREEDY, max_tokens=1))})
        assert engine.metrics().num_used_blocks == 0
        engine.add_request("d", [7, 8], replace(GREEDY, max_tokens=None))
        engine.step()
        engine.step()
        in_use = engine.metrics()
        assert (in_use.num_running, in_use.num_used_blocks) == (1, 1)
        engine.abort("d")
        metrics = engine.metrics()
        assert metrics.num_prompt_tokens == 2 * len(prompt) + 1 + 2
        assert metrics.num_generation_tokens == 7 + 2 * 4 + 1 + 2
        assert metrics.num_finished_requests == 4
        assert metrics.num_finished_outputs == {"length": 4, "abort": 1}
        # The second output shares the first one's prompt, whole blocks of it.
        assert metrics.prefix_hit_tokens == 2 * 2 * block_size
        assert metrics.prefix_query_tokens == 3 * len(prompt) + 1 + 2
        assert metrics.num_preemptions == 0
        assert 0 < metrics.busy_s < metrics.uptime_s

    def test_time_is_split_into_computing_exchanging_and_waiting(self, llm, monkeypatch):
        clock = SimpleNamespace(now_s=100.0)
        set_engine_clock(monkeypatch, lambda: clock.now_s)
        engine = Engine(llm.engine.model)
        execute = engine.model.executor.worker.execute

        def two_seconds(plan):
            clock.now_s += 2.0
            return execute(plan)

        monkeypatch.setattr(engine.model.executor.worker, "execute", two_seconds)
        monkeypatch.setattr(engine.model.executor, "exchange_s", lambda: 1.5)
        engine.add_request("a", [5], replace(GREEDY, max_tokens=3))
        clock.now_s += 10.0
        while engine.has_unfinished:
            engine.step()
            clock.now_s += 1.0
        statistics = engine.statistics()
        assert (statistics.compute_s, statistics.exchange_s, statistics.waiting_s) == (4.5, 1.5, 13.0)

    @pytest.mark.skipif(not HAS_NATIVE, reason="the native module is not built")
    def test_rows_of_the_asynchronized_softmax(self):
        """A query of each head in each layer for each token computed. A maximum of 0 does not suit the demo model."""
        with LLM(str(demo_model_path()), softmax="asynchronized", **SETTINGS) as llm:
            run(llm.engine, {"a": (list(range(5, 45)), GREEDY)})
            model = llm.engine.model.config
            statistics = llm.engine.statistics()
        num_rows = (40 + 7 - 1) * model.attention.num_heads * model.num_hidden_layers
        assert statistics.num_softmax_rows == num_rows
        assert 0 < statistics.num_recomputed_rows < num_rows


@pytest.mark.parametrize("layout", ["tp2", "pp2", "tp2-pp2"])
class TestExchanges:
    """Ranks are threads, which bring whole tensors to every sum, as gloo's do."""

    def test_predicted_and_counted_bytes_are_those_of_the_plans(self, layout):
        with closing(thread_llm(demo_model_path(), **SETTINGS, **LAYOUTS[layout])) as llm:
            plans = record_plans(llm)
            run(llm.engine, REQUESTS)
            statistics = llm.engine.statistics()
            ledgers = llm.engine.model.executor.ledger_rows()
            model = llm.engine.model.config
        assert_predicted_as_counted(statistics)
        parallel = parallel_config(**LAYOUTS[layout])
        rules = rules_of(Transport.GLOO)
        volume = Layout(model=model, parallel=parallel, activation_bytes=4, rules=rules)
        planned = predict_run(volume, run_of(plans, model.vocab_size, parallel.tensor_parallel_size))
        found = {(e.group, e.operation, e.phase): tuple(e.predicted) for e in statistics.exchanges}
        assert found == {tuple(k): tuple(sums) for k, sums in totals_of(chain(*planned)).items()}
        assert sum(e.counted.num_calls for e in statistics.exchanges) == sum(row.count for row in chain(*ledgers))

    def test_asking_in_the_midst_loses_nothing(self, layout):
        """Plans of a pipeline are in flight then; what they bring is reported by the step that follows, once."""
        with closing(thread_llm(demo_model_path(), **SETTINGS, **LAYOUTS[layout])) as llm:
            expected = run(llm.engine, REQUESTS)
            asked = run(llm.engine, REQUESTS, between=lambda: assert_predicted_as_counted(llm.engine.statistics()))
            llm.engine.check_integrity()
        assert {name: texts(output) for name, output in asked.items()} == {
            name: texts(output) for name, output in expected.items()
        }


def test_outputs_of_one_request_in_several_plans_in_flight_are_one_update():
    requests = {"a": (list(range(5, 25)), replace(GREEDY, n=4))}
    with closing(thread_llm(demo_model_path(), **SETTINGS, **LAYOUTS["pp3"])) as llm:
        expected = run(llm.engine, requests)
        asked = run(llm.engine, requests, between=llm.engine.statistics)
    assert texts(asked["a"]) == texts(expected["a"])


def test_news_of_an_aborted_request_are_not_reported_later():
    with closing(thread_llm(demo_model_path(), **SETTINGS, **LAYOUTS["pp2"])) as llm:
        engine = llm.engine
        for name in ("a", "b"):
            engine.add_request(name, [5, 6, 7], replace(GREEDY, max_tokens=50))
        while not engine._pending:
            engine.step()
            engine.statistics()
        [waiting] = engine._pending
        with pytest.raises(RequestError, match="is in use"):
            engine.add_request(waiting, [5], GREEDY)
        assert engine.abort(waiting).finished.outputs[0].finish_reason == "abort"
        assert not engine.is_live(waiting)
        engine.add_request(waiting, [5], replace(GREEDY, max_tokens=1))
        updates = []
        while engine.is_live(waiting):
            updates += [update for update in engine.step() if update.request_id == waiting]
        assert [len(update.chunks) for update in updates] == [1]


def test_a_prediction_of_other_bytes_shows(monkeypatch):
    """Of a check that believes that each step had a token more."""
    events = ExchangeCheck.events
    monkeypatch.setattr(ExchangeCheck, "events", lambda self, phase, n, *rest: events(self, phase, n + 1, *rest))
    with closing(thread_llm(demo_model_path(), **SETTINGS, **LAYOUTS["tp2"])) as llm:
        run(llm.engine, REQUESTS)
        statistics = llm.engine.statistics()
    [sums] = [e for e in statistics.exchanges if e.operation == "all_reduce" and e.phase.value == "decode"]
    assert sums.counted.num_calls == sums.predicted.num_calls
    assert sums.counted.wire_bytes < sums.predicted.wire_bytes


REQUESTS = {
    "a": (list(range(5, 45)), GREEDY),
    "b": (list(range(60, 63)), replace(GREEDY, temperature=0.8, seed=3, n=2, max_tokens=9)),
    "c": ([200], replace(GREEDY, logprobs=2)),
}


def run(engine: Engine, requests, between=lambda: None) -> dict[str, RequestOutput]:
    """Every output, of which each chunk was reported once, and each request at most once by a step."""
    for name, (prompt, params) in requests.items():
        engine.add_request(name, prompt, params)
    finished, tokens = {}, {}
    while engine.has_unfinished:
        updates = engine.step()
        assert len({update.request_id for update in updates}) == len(updates)
        for update in updates:
            for chunk in update.chunks:
                tokens.setdefault((update.request_id, chunk.index), []).extend(chunk.token_ids)
            if update.finished is not None:
                finished[update.request_id] = update.finished
        between()
    assert tokens == {(name, o.index): o.token_ids for name, output in finished.items() for o in output.outputs}
    return finished


def texts(output: RequestOutput) -> list[str]:
    return [completion.text for completion in output.outputs]


def assert_predicted_as_counted(statistics: EngineStatistics) -> None:
    assert statistics.exchanges
    for exchange in statistics.exchanges:
        assert exchange.counted == exchange.predicted, exchange
        assert exchange.counted.num_calls > 0


@pytest.mark.skipif(not HAS_NATIVE, reason="the native module is not built")
def test_ranks_that_are_processes_are_asked_over_their_lines_until_one_is_killed():
    """Which is known without a step; whoever asks then is told."""
    with LLM(str(demo_model_path()), pipeline_parallel_size=2, **SETTINGS) as llm:
        engine = llm.engine
        run(engine, REQUESTS, between=lambda: assert_predicted_as_counted(engine.statistics()))
        statistics = engine.statistics()
        ledgers = engine.model.executor.ledger_rows()
        assert {(e.group, e.operation) for e in statistics.exchanges} == {("pp", "send"), ("pp", "recv")}
        wire_bytes = sum(e.counted.wire_bytes for e in statistics.exchanges)
        assert wire_bytes == sum(row.wire_bytes for row in chain(*ledgers))
        assert statistics.exchange_s > 0

        assert engine.failure is None
        [child] = [p for p in psutil.Process().children() if "rank_process" in " ".join(p.cmdline())]
        os.kill(child.pid, signal.SIGKILL)
        deadline_s = time.monotonic() + 20
        while engine.failure is None and time.monotonic() < deadline_s:
            time.sleep(0.01)
        assert "rank 1" in engine.failure
        assert "SIGKILL" in engine.failure
        with pytest.raises(RankError, match="rank 1"):
            engine.statistics()


def test_one_rank_has_nobody_to_lose(llm):
    assert llm.engine.failure is None
