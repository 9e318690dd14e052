"""The comparison of servers: who runs when, what is kept, its ratios, and servers that do not start."""

import json
import sys
from pathlib import Path

import pytest
from scripted_server import scripted_server

from bench.serve_compare import Findings, Protocol, compare, measure_server
from bench.serve_report import ENGINE_ALONE, table, to_json
from bench.serve_targets import ServerTarget, Shape, TargetFailed, headrace, llama_server, read_weights_s, running

PROTOCOL = {
    "model": Path("models/tiny"),
    "threads": 2,
    "prompt_tokens": 128,
    "output_tokens": 64,
    "waves": 2,
    "concurrency": [1, 16],
}
SHAPE = Shape(max_num_seqs=16, max_model_len=272, threads=2)


def level(rate, decode=None):
    return {
        "output_tokens_per_s": rate,
        "decode_tokens_per_s": decode,
        "ttft_ms": {"p50": 1e3 / rate},
        "tpot_ms": {"p50": 2e3 / rate},
    }


def found(one, sixteen, decode=None, **fields):
    return {"levels": {"1": level(one), "16": level(sixteen, decode)}, **fields}


@pytest.fixture
def targets(tmp_path):
    weights = tmp_path / "weights"
    weights.write_bytes(b"x" * 1000)
    made = {"command": ("true",), "weights": (weights,)}
    return [
        ServerTarget(name="Headrace", format="int4", is_headrace=True, **made),
        ServerTarget(name="llama.cpp", format="q4_0", **made),
    ]


class TestRounds:
    def run(self, measurements, **settings):
        kept, said = [], []
        findings = compare(
            measurements,
            rounds=2,
            seed=7,
            idle_s=0.0,
            say=said.append,
            keep=lambda f: kept.append(f.num_rounds),
            **settings,
        )
        return findings, kept, said

    def test_targets_take_turns_and_change_their_order(self):
        calls = []
        measurements = {name: lambda seed, name=name: calls.append((name, seed)) or found(1, 2) for name in "abc"}
        findings, kept, _ = self.run(measurements)
        assert calls == [("a", 7), ("b", 7), ("c", 7), ("c", 1007), ("b", 1007), ("a", 1007)]
        assert kept == [1, 2]
        assert [r["round"] for r in findings.rounds["b"]] == [0, 1]
        assert len(findings.idle) == len(findings.running) == 6

    def test_one_that_fails_does_not_end_it(self):
        def fail(seed):
            if seed == 7:
                raise TargetFailed("no memory")
            return found(3, 4)

        findings, _, said = self.run({"a": lambda _: found(1, 2), "b": fail})
        assert findings.failed == {"b": "no memory"}
        assert [r["round"] for r in findings.rounds["b"]] == [1]
        assert any("b: no memory" in line for line in said)


class TestReport:
    def report(self, targets, rounds, **fields):
        findings = {"rounds": rounds, "failed": {}, "idle": [], "running": [], "num_rounds": 2, **fields}
        return to_json(PROTOCOL, targets, findings)

    def rounds(self):
        server = {"ready_s": 3.0, "read_weights_s": 0.5}
        return {
            ENGINE_ALONE: [found(50, 400, 500, round=0), found(40, 200, 250, round=1)],
            "Headrace": [
                found(48, 390, 480, round=0, **server),
                found(38, 190, 230, round=1, ready_s=2.0, read_weights_s=1.0),
            ],
            "llama.cpp": [found(24, 130, 160, round=0, **server), found(19, 100, None, round=1, **server)],
        }

    def test_ratios_are_of_the_same_round_and_the_best_of_each_figure(self, targets):
        report = self.report(targets, self.rounds())
        assert report["http_cost"]["output_tokens_per_s"]["1"] == pytest.approx((2 / 50 + 2 / 40) / 2)
        assert report["http_cost"]["output_tokens_per_s"]["16"] == pytest.approx((10 / 400 + 10 / 200) / 2)
        over = report["over"]["llama.cpp"]
        assert over["output_tokens_per_s"] == {"1": pytest.approx(2.0), "16": pytest.approx((3.0 + 1.9) / 2)}
        assert over["decode_tokens_per_s"] == {"16": pytest.approx(3.0)}
        [alone, ours, theirs] = report["targets"]
        assert alone["best"]["16"]["output_tokens_per_s"] == 400
        assert ours["best"]["16"]["ttft_p50_ms"] == pytest.approx(1e3 / 390)
        assert theirs["best"]["16"]["decode_tokens_per_s"] == 160
        assert (ours["ready_s"], ours["read_weights_s"], ours["weight_bytes"]) == ([3.0, 2.0], [0.5, 1.0], 1000)
        assert json.loads(json.dumps(report)) == report

    def test_the_table(self, targets):
        lines = table(self.report(targets, self.rounds())).splitlines()
        assert lines[0].startswith("| output tokens/s | 1 stream | 16 streams | decode alone, 16 | TTFT p50, 16 |")
        assert lines[2] == "| Headrace, engine alone | 50.0 | 400.0 | 500.0 | 2 ms | 5 ms | - | - |"
        assert lines[3] == "| Headrace int4, server | 48.0 | 390.0 | 480.0 | 3 ms | 5 ms | 2.00 s | 0.50 s |"
        assert lines[5] == "| Headrace / llama.cpp | 2.00x | 2.45x | 3.00x | - | - | - | - |"
        assert lines[6] == "| cost of HTTP | 4.5% | 3.8% | 6.0% | - | - | - | - |"
        assert len({line.count("|") for line in lines[:7]}) == 1
        assert "tiny, 2 threads" in lines[8]

    def test_what_never_ran_has_no_row_and_no_ratio(self, targets):
        rounds = self.rounds()
        del rounds["llama.cpp"]
        report = self.report(targets, rounds, failed={"llama.cpp": "no binary"})
        assert report["over"]["llama.cpp"]["output_tokens_per_s"] == {}
        assert "llama.cpp q4_0, server" not in table(report)

    def test_a_round_that_only_one_has_makes_no_ratio(self, targets):
        rounds = self.rounds()
        del rounds["llama.cpp"][0]
        assert self.report(targets, rounds)["over"]["llama.cpp"]["output_tokens_per_s"] == {
            "1": pytest.approx(2.0),
            "16": pytest.approx(1.9),
        }


class TestTargets:
    def test_both_servers_get_the_same_room_and_threads(self, tmp_path):
        (tmp_path / "model.safetensors").write_bytes(b"x")
        ours = headrace(tmp_path, "bfloat16", "int4", SHAPE).argv(99)
        theirs = llama_server(Path("llama-server"), tmp_path / "m.gguf", SHAPE, ["--no-mmap"]).argv(99)
        assert ours[ours.index("--threads") + 1] == theirs[theirs.index("--threads") + 1] == "2"
        assert ours[ours.index("--max-num-seqs") + 1] == theirs[theirs.index("--parallel") + 1] == "16"
        assert theirs[theirs.index("--ctx-size") + 1] == str(16 * 272)
        assert "--no-mmap" in theirs
        assert ours[-2:] == theirs[-2:] == ["--port", "99"]

    def test_the_format_is_what_runs(self, tmp_path):
        assert headrace(tmp_path, "bfloat16", "int4", SHAPE).format == "int4"
        assert headrace(tmp_path, "int4", "none", SHAPE).format == "int4"

    def target(self, script):
        return ServerTarget(name="it", format="x", command=(sys.executable, "-c", script), weights=())

    def test_one_that_ends_says_its_last_line(self, tmp_path):
        target = self.target("import sys; print('loading'); sys.exit('no such model')")
        with (
            pytest.raises(TargetFailed, match="it ended with 1: no such model"),
            running(target, tmp_path / "log"),
        ):
            pass

    def test_one_that_serves_is_waited_for_and_ended(self, tmp_path):
        """It answers 503 at first, as a server that loads does."""
        script = (
            "import http.server, sys\n"
            "count = 0\n"
            "class Handler(http.server.BaseHTTPRequestHandler):\n"
            "    def do_GET(self):\n"
            "        global count\n"
            "        count += 1\n"
            "        self.send_response(200 if count > 3 else 503)\n"
            "        self.end_headers()\n"
            "http.server.HTTPServer(('127.0.0.1', int(sys.argv[2])), Handler).serve_forever()\n"
        )
        log = tmp_path / "log"
        with running(self.target(script), log) as server:
            assert server.url.startswith("http://127.0.0.1:")
            assert server.ready_s > 0
            assert log.read_text().count("503") == 3
        with pytest.raises(TargetFailed), running(self.target("raise SystemExit(3)"), log):
            pass

    def test_weights_are_read_to_the_end(self, tmp_path):
        file = tmp_path / "weights"
        file.write_bytes(b"x" * (33 << 20))
        assert read_weights_s([file, file]) > 0
        with pytest.raises(FileNotFoundError):
            read_weights_s([tmp_path / "none"])


def test_a_level_with_failures_is_no_measurement(tmp_path, monkeypatch):
    """Answers that are shorter than asked for would flatter."""
    protocol = Protocol(
        model=tmp_path,
        quantize="none",
        threads=1,
        prompt_tokens=4,
        output_tokens=3,
        concurrency=(2,),
        waves=1,
        vocab_size=99,
    )
    with scripted_server() as server:
        sound = server.script
        target = ServerTarget(name="it", format="x", command=("true",), weights=())
        monkeypatch.setattr("bench.serve_compare.running", lambda *_: _there(server.url))
        measured = measure_server(target, protocol, 0, tmp_path / "log")
        assert measured["levels"]["2"]["num_completed"] == 2

        def script(asked):
            if asked.body is not None:
                asked.body["max_tokens"] -= 1
            return sound(asked)

        server.script = script
        with pytest.raises(TargetFailed, match="2 answers were shorter"):
            measure_server(target, protocol, 0, tmp_path / "log")


class _there:
    def __init__(self, url):
        self.url, self.ready_s = url, 1.0

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass


def test_nothing_found_yet_can_be_kept(targets):
    report = to_json(PROTOCOL, targets, {**vars(Findings()), "num_rounds": 0})
    assert [target["best"] for target in report["targets"]] == [{}, {}, {}]
    assert table(report)
