"""`/metrics` and `/stats` of a real server on two ranks, against what known requests must give."""

import asyncio
import json
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import openai
import psutil
import pytest
from checkpoints import HAS_NATIVE
from prometheus_client import parser
from prometheus_client.openmetrics import parser as openmetrics_parser

from headrace.config.server import ServerConfig
from headrace.engine.metrics import EngineStatistics, RequestMetrics
from headrace.server import engine_watch
from headrace.server.admission import Admission
from headrace.server.engine_watch import EngineWatch
from headrace.server.errors import Overloaded, Unavailable
from headrace.server.latencies import NUM_RECENT
from headrace.server.stats import build_stats
from tests.http_get import get
from tests.serving import RunningServer, engine_settings, running_server

pytest_plugins = ["tests.server_fixtures"]

pytestmark = pytest.mark.skipif(not HAS_NATIVE, reason="the native module is not built")

DOCUMENT = Path(__file__).parent.parent / "docs" / "metrics.md"
QUESTION = [{"role": "user", "content": "What is the largest ocean?"}]
Samples = dict[tuple[str, ...], float]


@pytest.fixture(scope="module")
def server() -> Iterator[RunningServer]:
    """Its engine is asked as often as anybody looks."""
    with (
        pytest.MonkeyPatch.context() as patch,
        running_server(engine_settings(parallel={"tensor_parallel_size": 2})) as running,
    ):
        patch.setattr(engine_watch, "_MIN_INTERVAL_S", 0.0)
        yield running


def scrape(server: RunningServer) -> Samples:
    """Every sample by its name and the values of its labels."""
    families = parser.text_string_to_metric_families(get(f"{server.url}/metrics").text)
    return {
        (sample.name, *(value for name, value in sorted(sample.labels.items()) if name != "model_name")): sample.value
        for family in families
        for sample in family.samples
    }


def eventually(look: Callable[[], object], expected: object) -> None:
    """What has ended is counted a moment later."""
    deadline_s = time.monotonic() + 20
    while (found := look()) != expected and time.monotonic() < deadline_s:
        time.sleep(0.1)
    assert found == expected


def eventually_grown(server: RunningServer, before: Samples, expected: Samples) -> None:
    def look() -> Samples:
        now = scrape(server)
        return {name: now[name] - before.get(name, 0) for name in expected}

    eventually(look, expected)


def test_counters_and_histograms_are_those_of_known_requests(server, client):
    before = scrape(server)
    chat = client.chat.completions.create(
        model="demo", messages=QUESTION, n=2, max_tokens=5, extra_body={"ignore_eos": True}
    )
    list(
        client.completions.create(
            model="demo", prompt=[[5, 6, 7], [9]], max_tokens=4, stream=True, extra_body={"ignore_eos": True}
        )
    )
    with pytest.raises(openai.BadRequestError):
        client.completions.create(model="demo", prompt="", temperature=-1)
    assert get(f"{server.url}/no/such/path").status == 404
    num_prompt_tokens = chat.usage.prompt_tokens + 3 + 1
    expected = {
        ("vllm:prompt_tokens_total",): num_prompt_tokens,
        ("vllm:generation_tokens_total",): 2 * 5 + 2 * 4,
        ("vllm:request_success_total", "length"): 4,
        ("vllm:request_success_total", "abort"): 0,
        ("vllm:time_to_first_token_seconds_count",): 3,
        ("vllm:inter_token_latency_seconds_count",): 2 * 4 + 2 * 3,
        ("vllm:request_time_per_output_token_seconds_count",): 3,
        ("vllm:e2e_request_latency_seconds_count",): 3,
        ("vllm:request_queue_time_seconds_count",): 3,
        ("vllm:request_prefill_time_seconds_count",): 3,
        ("vllm:request_decode_time_seconds_count",): 3,
        ("vllm:request_prompt_tokens_sum",): num_prompt_tokens,
        ("vllm:request_generation_tokens_sum",): 2 * 5 + 2 * 4,
        ("headrace:computed_tokens_total", "decode"): 2 * 4 + 2 * 3,
        ("headrace:http_requests_total", "POST", "/v1/chat/completions", "200"): 1,
        ("headrace:http_requests_total", "POST", "/v1/completions", "200"): 1,
        ("headrace:http_requests_total", "POST", "/v1/completions", "400"): 1,
        ("headrace:http_requests_total", "GET", "none", "404"): 1,
    }

    eventually_grown(server, before, expected)
    now = scrape(server)
    assert now["vllm:num_requests_running",] == now["vllm:num_requests_waiting",] == 0
    assert now["headrace:up",] == 1
    assert now["headrace:kv_cache_blocks",] == 512
    assert now["vllm:cache_config_info", "16", "auto", "True", "512"] == 1
    assert now["vllm:iteration_tokens_total_count",] == now["headrace:steps_total",]
    spans_s = [now[f"vllm:request_{part}_time_seconds_sum",] for part in ("queue", "prefill", "decode")]
    assert now["vllm:e2e_request_latency_seconds_sum",] == pytest.approx(sum(spans_s))


def test_steps_are_sorted_by_their_tokens(server, client):
    """Three of a prompt, then one at a time."""
    before = scrape(server)
    client.completions.create(model="demo", prompt=[5, 6, 7], max_tokens=4, extra_body={"ignore_eos": True})
    buckets = {
        ("vllm:iteration_tokens_total_bucket", le): number for le, number in (("1.0", 3), ("8.0", 4), ("+Inf", 4))
    }
    eventually_grown(server, before, {**buckets, ("vllm:iteration_tokens_total_sum",): 3 + 3})


def test_predicted_bytes_stand_beside_those_counted(server, client):
    client.completions.create(model="demo", prompt=[5, 6, 7], max_tokens=4)
    samples = scrape(server)
    for name in ("calls", "payload_bytes", "wire_bytes"):
        by_source: dict[str, Samples] = {"counted": {}, "predicted": {}}
        for (metric, *labels), value in samples.items():
            if metric == f"headrace:communication_{name}_total":
                *place, source = labels
                by_source[source][tuple(place)] = value
        assert by_source["counted"] == by_source["predicted"]
        assert by_source["counted"]["tp", "all_reduce", "decode"] > 0
        assert by_source["counted"]["tp", "all_reduce", "prefill"] > 0
    assert samples["headrace:time_seconds_total", "communication"] > 0


def test_openmetrics_for_who_accepts_it(server):
    answer = get(f"{server.url}/metrics", Accept="application/openmetrics-text; version=1.0.0")
    assert answer.headers["content-type"].startswith("application/openmetrics-text")
    families = {family.name: family for family in openmetrics_parser.text_string_to_metric_families(answer.text)}
    text = parser.text_string_to_metric_families(get(f"{server.url}/metrics").text)
    # The old format knows neither created times nor infos, and calls them gauges.
    names = {family.name.removesuffix("_info") for family in text}
    assert set(families) == {name for name in names if not name.endswith("_created")}
    assert families["vllm:prompt_tokens"].type == "counter"


def test_every_metric_is_documented_and_no_other(server, client):
    client.completions.create(model="demo", prompt=[5], max_tokens=2)
    families = openmetrics_parser.text_string_to_metric_families(
        get(f"{server.url}/metrics", Accept="application/openmetrics-text").text
    )
    suffixes = {"counter": "_total", "info": "_info"}
    exported = {family.name + suffixes.get(family.type, "") for family in families}
    documented = set(re.findall(r"^\| `((?:vllm|headrace):\w+)`", DOCUMENT.read_text(), re.MULTILINE))
    assert documented == exported


def test_stats_say_what_the_page_shows(server, client):
    client.completions.create(model="demo", prompt=[5, 6, 7], max_tokens=4, extra_body={"ignore_eos": True})
    stats = json.loads(get(f"{server.url}/stats").text)
    assert (stats["model"], stats["state"], stats["trouble"]) == ("demo", "ready", None)
    assert stats["layout"]["tensor_parallel_size"] == 2
    assert stats["layout"]["transport"] == "shm"
    assert stats["kv_blocks"] == {"total": 512, "used": 0, "block_size": 16}
    assert stats["softmax"]["schemes"] == {"synchronized": 4}
    assert stats["dataflow"]["source"] == "default"
    assert 0 < stats["ttft_s"]["p50"] <= stats["ttft_s"]["p95"]
    assert stats["time_s"]["compute"] > 0
    assert sum(stats["time_s"].values()) <= stats["uptime_s"] + 1
    for row in stats["communication"]:
        assert (row["calls"], row["wire_bytes"]) == (row["predicted_calls"], row["predicted_wire_bytes"])


def test_percentiles_are_those_of_the_last_requests(server):
    values_s = np.random.default_rng(1).exponential(1.0, 57)
    recent = [RequestMetrics(arrival_s=1.0, first_token_s=1.0 + value) for value in values_s]
    stats = build_stats(server.serving.context, None, recent)
    assert stats["ttft_s"]["last"] == pytest.approx(values_s[-1])
    assert stats["ttft_s"]["p50"] == pytest.approx(np.percentile(values_s, 50))
    assert stats["ttft_s"]["p95"] == pytest.approx(np.percentile(values_s, 95))
    assert stats["tpot_s"] == {"last": None, "p50": None, "p95": None}
    assert stats["num_running"] is stats["kv_blocks"] is stats["dataflow"] is None
    assert server.serving._observability.metrics.recent.maxlen == NUM_RECENT


def test_refusals_are_counted_by_the_limit_that_was_met():
    admission = Admission(ServerConfig(max_waiting_requests=2, max_waiting_tokens=10, max_logprob_bytes=100))
    admission.enter(1, 9)
    admission.hold_logprobs(60, now_s=0.0)
    for num_requests, num_tokens in ((2, 1), (2, 1), (1, 2)):
        with pytest.raises(Overloaded):
            admission.check(num_requests, num_tokens, now_s=0.0)
    with pytest.raises(Overloaded):
        admission.hold_logprobs(41, now_s=0.0)
    assert list(admission.num_refused.items()) == [
        ("max_waiting_requests", 2),
        ("max_waiting_tokens", 1),
        ("max_logprob_bytes", 1),
        ("max_bodies_bytes", 0),
        ("queue_timeout", 0),
    ]


class FakeEngine:
    """Answers when it is told to, with a number that tells how often it was asked."""

    def __init__(self) -> None:
        self.num_questions = 0
        self.may_answer = asyncio.Event()

    async def ask(self, question) -> EngineStatistics:
        self.num_questions += 1
        number = self.num_questions
        await self.may_answer.wait()
        return SimpleNamespace(metrics=SimpleNamespace(uptime_s=1.0), number=number)


class TestWatch:
    def test_an_engine_is_asked_once_however_many_look(self, monkeypatch):
        monkeypatch.setattr(engine_watch, "_MIN_INTERVAL_S", 20.0)

        async def look() -> None:
            engine = FakeEngine()
            engine.may_answer.set()
            watch = EngineWatch(engine)
            found = await asyncio.gather(*(watch.look() for _ in range(5)))
            assert {statistics.number for statistics in found} == {1}
            assert (await watch.look()).number == 1
            assert engine.num_questions == 1

        asyncio.run(look())

    def test_a_busy_engine_makes_nobody_wait(self, monkeypatch):
        monkeypatch.setattr(engine_watch, "_PATIENCE_S", 0.01)
        monkeypatch.setattr(engine_watch, "_MIN_INTERVAL_S", 0.0)

        async def look() -> None:
            engine = FakeEngine()
            watch = EngineWatch(engine)
            assert await watch.look() is None
            assert await watch.look() is None
            assert engine.num_questions == 1
            engine.may_answer.set()
            monkeypatch.setattr(engine_watch, "_PATIENCE_S", 10.0)
            assert (await watch.look()).number == 1
            assert (await watch.look()).number == 2

        asyncio.run(look())

    def test_an_engine_that_was_lost_has_its_last_word(self, monkeypatch):
        monkeypatch.setattr(engine_watch, "_MIN_INTERVAL_S", 0.0)

        async def look() -> None:
            engine = FakeEngine()
            engine.may_answer.set()
            watch = EngineWatch(engine)
            await watch.look()

            async def refuse(question) -> None:
                raise Unavailable("the engine was lost")

            engine.ask = refuse
            assert (await watch.look()).number == 1

        asyncio.run(look())


def test_ranks_that_were_lost_and_started_again_show(server, client):
    """The last test of the module, as it kills a rank. Counters of the new engine begin anew, and say when."""
    before = scrape(server)
    [rank] = [p for p in psutil.Process().children() if "rank_process" in " ".join(p.cmdline())]
    stream = client.completions.create(
        model="demo", prompt=[5], max_tokens=900, stream=True, extra_body={"ignore_eos": True}
    )
    next(iter(stream))
    rank.kill()
    with pytest.raises(openai.APIError, match="SIGKILL"):
        list(stream)
    eventually(lambda: scrape(server)["headrace:up",], 1)
    client.completions.create(model="demo", prompt=[5, 6], max_tokens=1)
    eventually(lambda: scrape(server)["vllm:prompt_tokens_total",], 2)
    now = scrape(server)
    assert now["headrace:engine_restarts_total",] == before["headrace:engine_restarts_total",] + 1
    assert now["headrace:lost_requests_total",] == before["headrace:lost_requests_total",] + 1
    assert now["vllm:prompt_tokens_created",] > before["vllm:prompt_tokens_created",] + 0.2
    count = ("vllm:time_to_first_token_seconds_count",)
    assert now[count] == before[count] + 2
    assert now["headrace:communication_calls_total", "tp", "all_reduce", "prefill", "counted"] > 0
