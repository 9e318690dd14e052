"""What an engine says of itself: counters against what known requests must give, bytes predicted against counted."""

import os
import signal
import time
from dataclasses import replace
from itertools import count
from types import SimpleNamespace

import psutil
import pytest
from checkpoints import HAS_NATIVE

from headrace import LLM, SamplingParams
from headrace.demo_model import demo_model_path

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
        monkeypatch.setattr("headrace.engine.engine.time", SimpleNamespace(monotonic=lambda: clock.now_s))
        llm.engine.add_request("a", range(5, 25), replace(GREEDY, n=2))
        latencies_s: dict[int, list[float | None]] = {0: [], 1: []}
        for step in count():
            if not llm.engine.has_unfinished:
                break
            clock.now_s += 2.0**step
            for update in llm.engine.step():
                for chunk in update.chunks:
                    latencies_s[chunk.index].append(chunk.itl_s)
        assert latencies_s == {0: [None, 2, 4, 8, 16, 32, 64], 1: [None, 4, 8, 16, 32, 64, 128]}


@pytest.mark.skipif(not HAS_NATIVE, reason="the native module is not built")
class TestFailure:
    def test_a_rank_killed_while_nothing_runs_is_known_without_a_step(self):
        with LLM(str(demo_model_path()), tensor_parallel_size=2, **SETTINGS) as llm:
            assert llm.engine.failure is None
            [child] = [p for p in psutil.Process().children() if "rank_process" in " ".join(p.cmdline())]
            os.kill(child.pid, signal.SIGKILL)
            deadline_s = time.monotonic() + 20
            while llm.engine.failure is None and time.monotonic() < deadline_s:
                time.sleep(0.01)
            assert "rank 1" in llm.engine.failure
            assert "SIGKILL" in llm.engine.failure

    def test_one_rank_has_nobody_to_lose(self, llm):
        assert llm.engine.failure is None
