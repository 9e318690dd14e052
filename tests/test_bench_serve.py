"""`headrace bench serve` against a server that says what the test tells it to: sound, slow, broken, gone."""

import asyncio
import json
import re
import shutil
import signal
import ssl
import subprocess
import sys
import time

import numpy as np
import pytest
from scripted_server import CLOSE, HANG, chunked, event, json_answer, scripted_server, sound, token_events

from headrace.bench.serve.address import Address
from headrace.bench.serve.arrivals import ClosedLoop, OpenLoop
from headrace.bench.serve.chunks import StreamedAnswer
from headrace.bench.serve.http_client import ConnectFailed, HttpClient
from headrace.bench.serve.lengths import RequestMix
from headrace.bench.serve.load import LoadRun
from headrace.bench.serve.metrics import Goodput, summarize
from headrace.bench.serve.records import FailureKind, RequestRecord
from headrace.bench.serve.session import LevelResult, Session
from headrace.bench.serve.settings import Load, ServeBench, Sweep, SweepOver, Target, Workload
from headrace.cli.bench_serve_plot import plot
from headrace.cli.main import main


@pytest.fixture(scope="module")
def shared_server():
    with scripted_server() as server:
        yield server


@pytest.fixture
def server(shared_server):
    shared_server.script = sound
    shared_server.asked.clear()
    return shared_server


@pytest.fixture
def bench(server, capsys):
    """Run the command on the server, always with the same draws; returns its exit code, output and error output."""

    def call(*argv):
        seed = () if "--seed" in argv else ("--seed", "1")
        code = main(["bench", "serve", "--base-url", server.url, *map(str, argv), *seed])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


@pytest.fixture
def report(bench):
    def call(*argv):
        code, out, err = bench("--json", *argv)
        assert (code, err) == (0, "")
        return json.loads(out)

    return call


@pytest.fixture
def refused(bench):
    """Run a command that must end with exit code 2 and one line; returns the line."""

    def call(*argv):
        code, out, err = bench(*argv)
        assert (code, out) == (2, "")
        assert err.startswith("headrace: error: ")
        assert err.count("\n") == 1
        return err

    return call


def said(found):
    """Remarks, but for those that a busy machine makes."""
    return [remark for remark in found["remarks"] if not remark.startswith("the generator")]


def ask_once(server, script, **client_settings):
    """The record of one completion of 3 tokens."""
    server.script = script

    async def ask():
        client = HttpClient(address=Address.parse(server.url), **client_settings)
        record = RequestRecord(scheduled_s=0.0, started_s=0.0, asked_prompt_tokens=1, asked_output_tokens=3)
        body = json.dumps({"prompt": "x", "max_tokens": 3}).encode()
        try:
            await client.exchange(client.post("/v1/completions", body), StreamedAnswer(record))
        finally:
            client.close()
        return record

    return asyncio.run(ask())


HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"
TEXT = event({"choices": [{"index": 0, "text": "x", "finish_reason": None}]})
LAST = event({"choices": [{"index": 0, "text": "", "finish_reason": "stop"}]})


class TestAnswers:
    def test_a_sound_one(self, server):
        found = ask_once(server, sound)
        assert found.failure is None
        assert (len(found.chunk_s), found.output_tokens, found.prompt_tokens) == (3, 3, 1)
        assert found.finish_reason == "length"
        assert found.chunk_s == sorted(found.chunk_s)
        assert found.chunk_s[-1] <= found.ended_s

    def test_in_pieces_of_one_byte(self, server):
        found = ask_once(server, lambda asked: [bytes([b]) for b in b"".join(chunked(token_events(asked)))])
        assert (found.failure, found.output_tokens, len(found.chunk_s)) == (None, 3, 3)

    def test_all_at_once_in_one_chunk_with_crlf(self, server):
        def script(asked):
            text = b"".join(token_events(asked)).replace(b"\n", b"\r\n")
            return [b"".join(chunked([b": hello\r\n\r\n" + text]))]

        found = ask_once(server, script)
        assert (found.failure, found.output_tokens, len(found.chunk_s)) == (None, 3, 3)

    def test_as_long_as_the_connection(self, server):
        """HTTP/1.0's way, without a length."""
        found = ask_once(server, lambda asked: [HEAD + b"\r\n", *token_events(asked), CLOSE])
        assert (found.failure, found.output_tokens) == (None, 3)

    def test_after_a_100_continue(self, server):
        found = ask_once(server, lambda asked: [b"HTTP/1.1 100 Continue\r\n\r\n", *sound(asked)])
        assert (found.failure, found.output_tokens) == (None, 3)

    def test_without_done_or_the_last_empty_line(self, server):
        found = ask_once(server, lambda _: chunked([TEXT, LAST.rstrip()]))
        assert (found.failure, found.finish_reason) == (None, "stop")

    def test_a_role_is_no_token_and_reasoning_and_tool_calls_are(self, server):
        deltas = [{"role": "assistant", "content": ""}, {"reasoning_content": "hm"}, {"tool_calls": [{"index": 0}]}, {}]
        events = [event({"choices": [{"index": 0, "delta": delta}]}) for delta in deltas]
        found = ask_once(server, lambda _: chunked([*events, event(b"[DONE]")]))
        assert (found.failure, len(found.chunk_s), found.output_tokens) == (None, 2, None)

    @pytest.mark.parametrize(
        ("answer", "kind", "status", "reason"),
        [
            ([CLOSE], FailureKind.DISCONNECT, None, "closed the connection before the answer ended"),
            ([HEAD, CLOSE], FailureKind.DISCONNECT, None, "closed the connection"),
            ([*chunked([TEXT])[:2], CLOSE], FailureKind.DISCONNECT, None, "closed the connection"),
            (
                [HEAD + b"Content-Length: 999\r\n\r\n", TEXT, CLOSE],
                FailureKind.DISCONNECT,
                None,
                "closed the connection",
            ),
            ([HEAD + b"\r\n", TEXT, CLOSE], FailureKind.DISCONNECT, None, "without a finish reason"),
            (chunked([TEXT]), FailureKind.DISCONNECT, None, "without a finish reason or [DONE]"),
            (chunked([]), FailureKind.DISCONNECT, None, "without a finish reason"),
            ([b"SSH-2.0-OpenSSH_9.2\r\n"], FailureKind.MALFORMED, None, "no HTTP answer"),
            ([HEAD + b"Transfer-Encoding: chunked\r\n\r\nxyz\r\n"], FailureKind.MALFORMED, None, "no HTTP answer"),
            (chunked([event(b"{")]), FailureKind.MALFORMED, None, "no JSON: b'{'"),
            (chunked([event(b"\xff")]), FailureKind.MALFORMED, None, "no JSON"),
            (chunked([event(b"[" * 100000)]), FailureKind.MALFORMED, None, "no JSON"),
            (chunked([event([1])]), FailureKind.MALFORMED, None, "[1] in place of an object"),
            (chunked([event({"choices": "x"})]), FailureKind.MALFORMED, None, "choices is 'x'"),
            (chunked([event({"choices": [3]})]), FailureKind.MALFORMED, None, "a choice is 3"),
            (chunked([event({"usage": {"prompt_tokens": -1}})]), FailureKind.MALFORMED, None, "prompt_tokens is -1"),
            (chunked([TEXT[:-2]]), FailureKind.DISCONNECT, None, "without a finish reason"),
            (chunked([TEXT[:-4]]), FailureKind.MALFORMED, None, "no JSON"),
            (json_answer({"choices": []}), FailureKind.MALFORMED, None, "application/json, no event stream"),
            (
                chunked(
                    [TEXT, event({"error": {"message": "out of blocks", "type": "server_error"}}), event(b"[DONE]")]
                ),
                FailureKind.STREAM_ERROR,
                None,
                "out of blocks",
            ),
            (
                json_answer({"error": {"message": "too many"}}, "429 Too Many Requests"),
                FailureKind.STATUS,
                429,
                "too many",
            ),
            (json_answer(b"overloaded", "503 Service Unavailable"), FailureKind.STATUS, 503, "overloaded"),
            (json_answer({"error": "plain"}, "500 Oops"), FailureKind.STATUS, 500, "plain"),
            (json_answer({"detail": "x"}, "404 Not Found"), FailureKind.STATUS, 404, '{"detail": "x"}'),
            (json_answer(b"", "401 Unauthorized"), FailureKind.STATUS, 401, ""),
        ],
    )
    def test_broken_ones(self, server, answer, kind, status, reason):
        found = ask_once(server, lambda _: answer)
        assert (found.failure.kind, found.failure.status) == (kind, status)
        assert reason in found.failure.reason
        assert not found.is_completed
        assert found.ended_s is not None

    def test_a_cut_at_every_byte_is_a_failure(self, server):
        """Wherever a connection ends, but for the end itself, the request has failed, and nothing hangs or raises."""
        whole = b"".join(chunked([TEXT, LAST, event(b"[DONE]")]))
        kinds = {ask_once(server, lambda _, n=n: [whole[:n], CLOSE]).failure.kind for n in range(len(whole))}
        assert kinds == {FailureKind.DISCONNECT}
        assert ask_once(server, lambda _: [whole, CLOSE]).failure is None

    @pytest.mark.parametrize("start", [[], [HEAD], chunked([TEXT])[:2]])
    def test_silence_ends_by_the_timeout(self, server, start):
        found = ask_once(server, lambda _: [*start, HANG], timeout_s=0.1)
        assert (found.failure.kind, found.failure.reason) == (FailureKind.TIMEOUT, "no end after 0.1 s")

    def test_nobody_listens(self, server):
        async def ask():
            client = HttpClient(address=Address.parse("http://127.0.0.1:1"))
            record = RequestRecord(scheduled_s=0.0, started_s=0.0, asked_prompt_tokens=1, asked_output_tokens=3)
            await client.exchange(client.get("/"), StreamedAnswer(record))

        with pytest.raises(ConnectFailed, match=r"refused|Connect call failed"):
            asyncio.run(ask())


@pytest.fixture(scope="module")
def tls_server(tmp_path_factory):
    """With a certificate that nobody has signed."""
    folder = tmp_path_factory.mktemp("tls")
    key, certificate = folder / "key.pem", folder / "certificate.pem"
    subject = ["-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1", "-days", "2"]
    files = ["-keyout", str(key), "-out", str(certificate)]
    made = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", *subject, *files]
    subprocess.run(made, check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    with scripted_server(context) as server:
        yield server


@pytest.mark.skipif(shutil.which("openssl") is None, reason="there is no openssl to make a certificate")
class TestTls:
    def test_a_certificate_is_checked(self, tls_server, capsys):
        assert main(["bench", "serve", "--base-url", tls_server.url]) == 2
        captured = capsys.readouterr()
        assert (captured.out, captured.err.count("\n")) == ("", 1)
        assert f"cannot reach {tls_server.url}: TLS: " in captured.err
        assert "certificate" in captured.err.lower()
        assert tls_server.asked == []

    def test_or_not_where_that_is_asked_for(self, tls_server, capsys):
        argv = ["--insecure", "--num-requests", "5", "--concurrency", "2", "--request-mix", "3:4"]
        assert main(["bench", "serve", "--json", "--base-url", tls_server.url, *argv]) == 0
        found = json.loads(capsys.readouterr().out)
        assert (found["num_completed"], found["output_tokens"]) == (5, 20)

    def test_plain_http_to_it_is_one_line(self, tls_server, capsys):
        assert main(["bench", "serve", "--base-url", tls_server.url.replace("https", "http")]) == 2
        captured = capsys.readouterr()
        assert (captured.out, captured.err.count("\n")) == ("", 1)


class TestLoad:
    def test_a_closed_loop_keeps_its_connections(self, server, report):
        found = report("--concurrency", 3, "--num-requests", 12, "--request-mix", "5:4", "--vocab-size", 1000)
        assert (found["num_completed"], found["num_failed"], found["output_tokens"]) == (12, 0, 48)
        assert found["arrivals"] == {"kind": "closed loop", "concurrency": 3}
        assert found["peak_concurrency"] <= 3
        assert found["prompt_tokens"] == 60
        assert len({asked.connection for asked in server.completions()}) <= 3
        assert said(found) == []

    def test_requests_say_what_was_asked_for(self, server, report):
        report(
            *("--num-requests", 2, "--request-mix", "5:4", "--vocab-size", 1000, "--ignore-eos", "--api-key", "secret"),
            *("--extra-body", '{"top_k": 1, "temperature": null}', "--header", "X-Test: yes"),
        )
        [warm_up, *measured] = server.completions()
        for asked in (warm_up, *measured):
            assert asked.path == "/v1/completions"
            assert asked.headers["authorization"] == "Bearer secret"
            assert asked.headers["x-test"] == "yes"
            body = dict(asked.body)
            assert len(body.pop("prompt")) == 5
            assert body == {
                "model": "scripted",
                "max_tokens": 4,
                "stream": True,
                "stream_options": {"include_usage": True},
                "ignore_eos": True,
                "top_k": 1,
            }
        assert len({tuple(asked.body["prompt"]) for asked in server.completions()}) == 3

    def test_a_key_from_the_environment(self, server, report, monkeypatch):
        monkeypatch.setenv("OPENAI_API_KEY", "from-outside")
        report("--num-requests", 1)
        assert server.completions()[0].headers["authorization"] == "Bearer from-outside"

    def test_chat(self, server, report):
        found = report("--endpoint", "chat", "--num-requests", 3, "--request-mix", "6:2")
        assert (found["num_completed"], found["prompt_tokens"], found["output_tokens"]) == (3, 18, 6)
        assert [m["role"] for m in server.completions()[0].body["messages"]] == ["user"]

    def test_the_same_seed_asks_the_same(self, server, capsys):
        def prompts(*seed):
            server.asked.clear()
            argv = ["--num-requests", 6, "--concurrency", 1, "--request-mix", "2-9:1-5", "--vocab-size", 999]
            assert main(["bench", "serve", "--base-url", server.url, "--json", *map(str, argv), *seed]) == 0
            found = json.loads(capsys.readouterr().out)
            assert not seed or found["seed"] == int(seed[1])
            return [(asked.body["prompt"], asked.body["max_tokens"]) for asked in server.completions()]

        assert prompts("--seed", "1") == prompts("--seed", "1") != prompts("--seed", "2")
        assert prompts() != prompts(), "a server that is asked twice must not know the prompts"

    def test_an_open_loop(self, server, report):
        found = report("--rate", 200, "--num-requests", 20, "--request-mix", "2:2", "--vocab-size", 999)
        assert found["arrivals"] == {"kind": "open loop", "rate_per_s": 200.0, "burstiness": 1.0, "burst_size": 1}
        assert found["num_completed"] == 20
        assert found["duration_s"] > 0.03

    def test_a_duration_ends_both_loops(self, server, report):
        for load in (("--rate", 50), ("--concurrency", 2)):
            found = report(*load, "--duration", 0.2, "--request-mix", "2:1")
            assert found["num_completed"] == found["num_requests"] > 2

    def test_all_at_once(self, server, report):
        found = report("--rate", "inf", "--num-requests", 30, "--request-mix", "1:1", "--vocab-size", 999)
        assert found["num_completed"] == 30
        assert found["arrivals"]["rate_per_s"] is None

    def test_prompts_of_a_file(self, server, report, tmp_path):
        file = tmp_path / "prompts.jsonl"
        file.write_text('{"prompt": "one two"}\n{"prompt": [7, 8, 9], "output_tokens": 2}\n')
        found = report(
            "--prompts", file, "--num-requests", 4, "--request-mix", "1:5", "--concurrency", 1, "--warmup", 0
        )
        asked = [(a.body["prompt"], a.body["max_tokens"]) for a in server.completions()]
        assert sorted(map(str, asked)) == sorted(map(str, [("one two", 5), ([7, 8, 9], 2)] * 2))
        assert (found["num_prompts_of_file"], found["request_mix"]) == (2, None)

    def test_words_are_fitted_with_the_servers_tokenizer(self, server, report):
        """This one counts two tokens a word, as vLLM's route does and then as llama.cpp's."""
        for field in ("prompt", "content"):

            def script(asked, field=field):
                if asked.path != "/tokenize":
                    return sound(asked)
                if field not in asked.body:
                    return json_answer({"tokens": []})
                return json_answer({"tokens": [1] * 2 * len(asked.body[field].split())})

            server.script = script
            server.asked.clear()
            found = report("--num-requests", 3, "--request-mix", "20:1", "--concurrency", 1)
            assert [len(a.body["prompt"].split()) for a in server.completions()] == [10] * 4
            assert found["prompts_are"] == "random words, fitted with the server's tokenizer"

    def test_without_a_tokenizer_the_prompts_are_an_estimate(self, server, report):
        server.script = lambda asked: (
            chunked([piece.replace(b'"prompt_tokens": 20', b'"prompt_tokens": 25') for piece in token_events(asked)])
            if asked.path == "/v1/completions"
            else sound(asked)
        )
        found = report("--num-requests", 2, "--request-mix", "20:1")
        assert found["prompts_are"] == "random words, one a token"
        assert found["prompt_tokens"] == 50
        [remark] = said(found)
        assert "prompts have 25.0 tokens on average" in remark

    def test_each_requests_times_can_be_kept(self, server, report, tmp_path):
        file = tmp_path / "requests.jsonl"
        found = report("--num-requests", 5, "--request-mix", "3:4", "--requests-out", file)
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        assert len(lines) == 5
        ttft = [line["chunk_s"][0] - line["started_s"] for line in lines]
        assert np.mean(ttft) * 1e3 == pytest.approx(found["ttft_ms"]["mean"])
        assert all(len(line["chunk_s"]) == line["output_tokens"] == 4 for line in lines)

    def test_kept_connections_that_have_gone_are_made_anew(self, server, report):
        """llama.cpp's server hangs up after a streamed answer without having said so."""
        server.script = lambda asked: [*sound(asked), CLOSE]
        found = report("--num-requests", 6, "--concurrency", 1)
        assert (found["num_completed"], found["num_failed"]) == (6, 0)

    def test_a_server_that_says_close_is_believed(self, server, report):
        def script(asked):
            head, *rest = sound(asked)
            return [head.replace(b"\r\n", b"\r\nConnection: close\r\n", 1), *rest, CLOSE]

        server.script = script
        found = report("--num-requests", 6, "--concurrency", 1)
        assert (found["num_completed"], found["num_reconnected"]) == (6, 0)

    def test_failures_are_counted_by_reason(self, server, report):
        answers = [
            json_answer({"error": {"message": "queue is full"}}, "429 Too Many Requests"),
            json_answer({"error": {"message": "queue is full"}}, "429 Too Many Requests"),
            json_answer({"error": {"message": "draining"}}, "503 Service Unavailable"),
            [HEAD, CLOSE],
        ]

        def script(asked):
            if not asked.path.endswith("completions") or len(server.completions()) <= 2 or not answers:
                return sound(asked)
            return answers.pop(0)

        server.script = script
        found = report("--num-requests", 8, "--concurrency", 1, "--goodput", "ttft:60000")
        assert (found["num_completed"], found["num_failed"]) == (4, 4)
        assert [(f["kind"], f["status"], f["reason"], f["count"]) for f in found["failures"][:2]] == [
            ("status", 429, "queue is full", 2),
            ("status", 503, "draining", 1),
        ]
        assert found["failures"][2]["kind"] == "disconnect"
        assert (found["num_good"], found["good_share"]) == (4, 0.5)
        assert said(found) == ["4 of 8 requests failed; the figures are of the others"]


class TestSweep:
    def test_levels_are_loads_of_their_own(self, server, report):
        found = report("--sweep", "concurrency", "1,2,5", "--num-requests", 10, "--request-mix", "4:2")
        assert [level["arrivals"]["concurrency"] for level in found["levels"]] == [1, 2, 5]
        assert [level["num_completed"] for level in found["levels"]] == [10, 10, 10]
        rates = [level["output_tokens_per_s"] for level in found["levels"]]
        assert rates[found["best_level"]] == max(rates)
        prompts = [asked.body["prompt"] for asked in server.completions()]
        assert len(set(prompts)) == 31, "no level may find another's prompts in a cache"

    def test_rates_keep_the_shape_of_arrivals(self, server, report):
        found = report("--sweep", "rate", "100,400", "--burst-size", 2, "--num-requests", 4, "--request-mix", "4:2")
        assert [level["arrivals"]["rate_per_s"] for level in found["levels"]] == [100, 400]
        assert {level["arrivals"]["burst_size"] for level in found["levels"]} == {2}

    def test_auto_doubles_until_goodput_falls(self, server, report):
        """Answers are refused as soon as more than four come in one load of eight."""

        def script(asked):
            number = (len(server.completions()) - 2) // 8
            if asked.path.endswith("completions") and number >= 2:
                return json_answer({"error": {"message": "full"}}, "429 Too Many Requests")
            return sound(asked)

        server.script = script
        found = report(
            *("--sweep", "concurrency", "auto", "--num-requests", 8, "--request-mix", "4:2"),
            *("--goodput", "ttft:60000", "e2el:60000"),
        )
        levels = [level["arrivals"]["concurrency"] for level in found["levels"]]
        assert levels in ([1, 2], [1, 2, 4])
        assert found["levels"][-1]["goodput_per_s"] < found["levels"][-2]["goodput_per_s"]

    def test_a_table_and_a_plot(self, server, bench, tmp_path):
        """The second level has no answer at all."""
        server.script = lambda asked: (
            json_answer({"error": {"message": "full"}}, "429 Too Many Requests")
            if len(server.completions()) > 5
            else sound(asked)
        )
        file = tmp_path / "sweep.svg"
        argv = ["--sweep", "concurrency", "1,2", "--num-requests", 4, "--request-mix", "4:3", "--goodput", "ttft:60000"]
        code, out, err = bench(*argv, "--plot", file)
        assert (code, err) == (0, "")
        lines = out.splitlines()
        assert lines[0].split()[:3] == ["done", "failed", "requests/s"]
        assert lines[1].split()[:4] == ["concurrency", "1", "4", "0"]
        assert lines[2].split()[:4] == ["concurrency", "2", "0", "4"]
        assert re.search(r"^most +[\d.,]+ requests/s within limits, at concurrency 1$", out, re.MULTILINE)
        assert "failed at concurrency 2: 4 x status 429: full" in out
        assert "<svg" in file.read_text()

    @pytest.mark.parametrize(
        ("chunks", "limits"), [([1.0, 1.0], None), ([1.0, 1.0], Goodput(tpot_s=0.1)), ([1.0], None)]
    )
    def test_what_took_no_time_is_drawn_too(self, tmp_path, chunks, limits):
        """Tokens of one read have the same time, which a logarithmic scale does not know."""
        results = []
        for rate in (1.0, 2.0):
            record = RequestRecord(
                scheduled_s=0.0,
                started_s=0.0,
                asked_prompt_tokens=1,
                asked_output_tokens=2,
                chunk_s=chunks,
                ended_s=3.0,
            )
            metrics = summarize([record], limits)
            results.append(LevelResult(arrivals=OpenLoop(rate), run=LoadRun(), metrics=metrics))
        plot(results, limits, tmp_path / "sweep.svg")
        assert (tmp_path / "sweep.svg").read_text().count("<svg") == 1

    def test_a_stop_ends_the_sweep(self, server):
        server.script = lambda asked: sound(asked) if len(server.completions()) <= 3 else [HANG]
        bench = ServeBench(
            target=Target(address=Address.parse(server.url)),
            workload=Workload(mix=RequestMix.parse("3:2"), vocab_size=99),
            load=Load(arrivals=ClosedLoop(1), num_requests=9),
            sweep=Sweep(SweepOver.CONCURRENCY, (2, 4)),
        )

        async def run():
            session = Session(bench)

            async def stop():
                while len(server.completions()) < 5:
                    await asyncio.sleep(0.01)
                session.generator.stop()

            stopping = asyncio.create_task(stop())
            results = [result async for result in session.results()]
            await stopping
            return results

        [result] = asyncio.run(run())
        assert result.run.was_stopped
        assert (result.metrics.num_completed, len(result.run.under_way)) == (2, 2)


class TestCommand:
    def test_the_table(self, bench):
        code, out, err = bench(
            "--num-requests", 4, "--concurrency", 2, "--request-mix", "4:3", "--goodput", "ttft:60000"
        )
        assert (code, err) == (0, "")
        lines = out.splitlines()
        assert lines[0].split() == ["mean", "p50", "p90", "p95", "p99", "max"]
        assert [line[:23].strip() for line in lines[1:5]] == [
            *("time to first token", "time per output token", "between chunks", "whole answer"),
        ]
        assert re.search(r"requests +4 done, 0 failed, in ", out)
        assert "12 output" in out
        assert "100.0% within limits" in out

    def test_failures_are_in_the_table(self, server, bench):
        server.script = lambda asked: (
            json_answer({"error": {"message": "full"}}, "429 Too Many Requests")
            if len(server.completions()) > 3
            else sound(asked)
        )
        code, out, _ = bench("--num-requests", 4, "--concurrency", 1)
        assert code == 0
        assert "2 done, 2 failed" in out
        assert "2 x status 429: full" in out
        assert "note: 2 of 4 requests failed" in out

    def test_a_server_that_is_not_there(self, capsys):
        assert main(["bench", "serve", "--base-url", "http://127.0.0.1:1"]) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        assert captured.err.startswith("headrace: error: cannot reach http://127.0.0.1:1: ")
        assert captured.err.count("\n") == 1

    def test_a_name_that_is_nobodys(self, capsys):
        assert main(["bench", "serve", "--base-url", "http://no-such-host.invalid"]) == 2
        assert capsys.readouterr().err.startswith("headrace: error: cannot reach http://no-such-host.invalid: ")

    @pytest.mark.parametrize(
        ("answer", "message"),
        [
            (json_answer({"detail": "no"}, "404 Not Found"), "/v1/models answers 404"),
            (json_answer(b"<html>"), "is this an OpenAI endpoint?"),
            (json_answer({"data": []}), "lists no model; name one with --model"),
            (json_answer({"data": [{"id": 3}]}), "lists no model"),
            ([b"+OK POP3 ready\r\n"], "does not answer as HTTP does"),
            ([CLOSE], "does not answer as HTTP does"),
        ],
    )
    def test_a_server_that_is_no_openai_endpoint(self, server, refused, answer, message):
        server.script = lambda _: answer
        assert message in refused()

    def test_a_first_request_that_fails_ends_it(self, server, refused):
        server.script = lambda asked: (
            json_answer({"error": {"message": "unknown field 'ignore_eos'"}}, "400 Bad Request")
            if asked.path.endswith("completions")
            else sound(asked)
        )
        line = refused("--ignore-eos")
        assert "the first request to http://127.0.0.1" in line
        assert "failed: status 400: unknown field 'ignore_eos'" in line

    def test_all_requests_failing_is_an_error_after_the_figures(self, server, bench):
        server.script = lambda asked: json_answer({"error": {"message": "full"}}, "503 Service Unavailable")
        code, out, err = bench("--model", "x", "--num-requests", 3, "--warmup", 0, "--json", "--vocab-size", 999)
        assert code == 2
        assert json.loads(out)["num_failed"] == 3
        assert err == "headrace: error: no request was completed: status 503: full\n"

    @pytest.mark.parametrize(
        ("argv", "message"),
        [
            (["--request-mix", "x"], "--request-mix is 'x'"),
            (["--rate", "0"], "--rate is 0"),
            (["--rate", "inf", "--duration", "3"], "--rate inf sends everything at once"),
            (["--concurrency", "0"], "--concurrency is 0"),
            (["--rate", "1", "--concurrency", "1"], "not allowed with argument"),
            (["--burstiness", "2"], "need --rate"),
            (["--num-requests", "0"], "--num-requests is 0"),
            (["--warmup", "-1"], "--warmup is -1"),
            (["--duration", "0"], "--duration is 0"),
            (["--timeout", "0"], "--timeout is 0"),
            (["--goodput", "ttft"], "--goodput is 'ttft'"),
            (["--goodput", "ttft:0"], "--goodput is 'ttft:0'"),
            (["--goodput", "itl:5"], "--goodput is 'itl:5'"),
            (["--sweep", "speed", "1"], "--sweep is over 'speed'"),
            (["--sweep", "rate", "1,0"], "levels '1,0'"),
            (["--sweep", "concurrency", "1.5"], "levels '1.5'"),
            (["--sweep", "rate", "1", "--rate", "1"], "leave --rate and --concurrency out"),
            (["--requests-out", "/no/such/folder/x"], "there is no such folder"),
            (["--plot", "x.svg"], "--plot draws a sweep"),
            (["--extra-body", "{"], "--extra-body is no JSON"),
            (["--extra-body", "3"], "give an object"),
            (["--extra-body", '{"stream": false}'], "always streamed"),
            (["--header", "x"], "--header is 'x'"),
            (["--header", "x: a\r\nb: c"], "plain ASCII on one line"),
            (["--vocab-size", "1"], "--vocab-size is 1"),
            (["--vocab-size", "99", "--endpoint", "chat"], "need --endpoint completions"),
            (["--shared-prefix-tokens", "-1"], "--shared-prefix-tokens is -1"),
            (["--seed", "-1"], "--seed is -1"),
            (["--prompts", "/no/such/file"], "No such file"),
            (["--base-url", "x"], "--base-url is 'x'"),
        ],
    )
    def test_what_cannot_be_asked_for_is_refused_before_anything_is_sent(self, server, refused, argv, message):
        assert message in refused(*argv)
        assert server.asked == []

    def test_messages_need_chat(self, refused, tmp_path):
        file = tmp_path / "prompts.jsonl"
        file.write_text('{"messages": [{"role": "user", "content": "x"}]}')
        assert "need --endpoint chat" in refused("--prompts", file)

    def test_an_interrupt_gives_the_figures_so_far(self, server):
        """Six answers come, and then silence."""
        server.script = lambda asked: [*sound(asked)] if len(server.completions()) <= 7 else [HANG]
        argv = [sys.executable, "-m", "headrace", "bench", "serve", "--base-url", server.url, "--json"]
        process = subprocess.Popen(
            [*argv, "--concurrency", "2", "--num-requests", "50"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        try:
            wait_until(lambda: len(server.completions()) >= 9)
            process.send_signal(signal.SIGINT)
            out, err = process.communicate(timeout=30)
        finally:
            process.kill()
        found = json.loads(out)
        assert process.returncode == 130
        assert b"figures so far" in err
        assert (found["num_completed"], found["num_cut_off"], found["was_stopped"]) == (6, 2, True)

    def test_an_interrupt_before_any_answer_is_quiet(self, server):
        server.script = lambda _: [HANG]
        argv = [sys.executable, "-m", "headrace", "bench", "serve", "--base-url", server.url]
        process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        try:
            wait_until(lambda: server.asked)
            process.send_signal(signal.SIGINT)
            assert process.communicate(timeout=30) == (b"", b"")
        finally:
            process.kill()
        assert process.returncode == 130


def wait_until(condition, limit_s=30.0):
    until = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < until, "this takes too long"
        time.sleep(0.02)
