"""The comparison with other engines: who runs when, what counts, what the table says. No engine is needed."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from bench.compare import EngineFailed, best, command, compare, run_json, to_json
from bench.config import Comparison, EngineSpec, read_comparison
from bench.machine_noise import CpuUse, remarks, spread
from bench.peers.protocol import BATCH_CONTEXT_TOKENS, BATCH_STEPS, DECODE_STEPS, PROMPT_TOKENS, Request, measure
from bench.report import table
from bench.setup_peers import SETUPS, openvino_group_size, toml

QUIET = CpuUse(busy=0.0, steal=0.0)
OURS = EngineSpec(engine="headrace", format="int4", model=Path("/models/tiny"))
THEIRS = EngineSpec(
    engine="llamacpp", format="q4_0", model=Path("/models/tiny.gguf"), python=Path("/envs/llamacpp/bin/python")
)
COMPARISON = Comparison(checkpoint=Path("/models/tiny"), threads=2, engines=(OURS, THEIRS))


def report(engine: str, prefill: float, decode: float, **batched: float) -> dict[str, object]:
    facts = {"versions": {"headrace": "1.0"}} if engine == "headrace" else {"version": "9.9"}
    sizes = {name.removeprefix("b"): rate for name, rate in batched.items()}
    return {"engine": engine, "prefill_512": prefill, "decode_from_512": decode, "batched_decode": sizes, **facts}


class Machine:
    """Plays all processes: answers in the order given for each engine, an exception being raised."""

    def __init__(self, **answers):
        self.answers = answers
        self.calls = []

    def __call__(self, argv):
        name = next(name for name in ("bench.limits", "headrace", "llamacpp") if any(name in word for word in argv))
        self.calls.append(name)
        if name == "bench.limits":
            return {"read_gb_per_s": 30.0 + len(self.calls), "multiply_gops": {"int8": 900.0}}
        answer = self.answers[name].pop(0)
        if isinstance(answer, BaseException):
            raise answer
        return answer


def run(machine, rounds, keep=lambda _: None):
    said = []
    findings = compare(
        COMPARISON,
        rounds=rounds,
        rounds_per_process=3,
        batch_sizes=(1, 4),
        idle_s=0.0,
        run=machine,
        say=said.append,
        keep=keep,
    )
    return findings, said


class TestCompare:
    def test_engines_take_turns_and_limits_come_with_every_round(self):
        machine = Machine(
            headrace=[report("headrace", 300, 50, b1=60, b4=200), report("headrace", 310, 40, b1=70, b4=190)],
            llamacpp=[report("llama.cpp", 120, 30, b1=50, b4=70), report("llama.cpp", 110, 40, b1=40, b4=80)],
        )
        findings, said = run(machine, rounds=2)
        assert machine.calls == ["bench.limits", "headrace", "llamacpp"] * 2
        assert len(findings.limits) == 2
        assert len(findings.idle) == len(findings.running) == 6
        assert len(said) == 4
        data = to_json(COMPARISON, findings, 3)
        ours, theirs = data["engines"]
        assert (ours["prefill_512"], ours["decode_from_512"]) == (310, 50)
        assert ours["batched_decode"] == {"1": 70, "4": 200}
        assert (theirs["engine"], theirs["version"], theirs["batched_decode"]) == (
            "llama.cpp",
            "9.9",
            {"1": 50, "4": 80},
        )
        assert json.loads(json.dumps(data))["rounds"] == 2

    def test_an_engine_that_fails_leaves_the_others_and_is_named(self):
        machine = Machine(
            headrace=[report("headrace", 300, 50, b1=60), report("headrace", 1, 1, b1=1)],
            llamacpp=[EngineFailed("no such model"), report("llama.cpp", 120, 30, b1=50)],
        )
        findings, said = run(machine, rounds=2)
        data = to_json(COMPARISON, findings, 3)
        assert data["failed"] == {"llamacpp q4_0": "no such model"}
        assert [engine["prefill_512"] for engine in data["engines"]] == [300, 120]
        assert "round 1 of 2, llamacpp q4_0: no such model" in said

    def test_what_was_found_is_kept_after_each_round(self):
        machine = Machine(
            headrace=[report("headrace", 300, 50, b1=60), KeyboardInterrupt()],
            llamacpp=[report("llama.cpp", 120, 30, b1=50)],
        )
        kept = []
        with pytest.raises(KeyboardInterrupt):
            run(machine, rounds=2, keep=lambda findings: kept.append(to_json(COMPARISON, findings, 3)))
        assert [(data["rounds"], len(data["engines"])) for data in kept] == [(1, 2)]

    def test_commands_name_the_same_protocol(self):
        ours, theirs = (command(spec, 2, (1, 32), 3) for spec in (OURS, THEIRS))
        assert ours[:6] == [sys.executable, "-m", "headrace", "bench", "model", "--json"]
        assert ours[ours.index("--quantize") + 1] == "int4"
        assert "--batch-invariant" in ours
        assert "--no-batch-invariant" in command(replace(OURS, batch_invariant=False), 2, (1, 32), 3)
        assert theirs[:4] == ["/envs/llamacpp/bin/python", "-m", "bench.peers.llamacpp", "/models/tiny.gguf"]
        assert ours[-7:] == theirs[-7:] == ["--threads", "2", "--rounds", "3", "--batch-sizes", "1", "32"]

    def test_a_process_gives_its_last_line(self):
        code = "import sys; print('loading'); print('{\"figure\": 1}')"
        assert run_json([sys.executable, "-c", code, "--threads", "1"]) == {"figure": 1}

    @pytest.mark.parametrize(
        ("code", "message"),
        [("import sys; sys.exit('cannot load')", "cannot load"), ("pass", "exit code 0"), ("1 / 0", "ZeroDivision")],
    )
    def test_a_process_without_a_report_has_failed(self, code, message):
        with pytest.raises(EngineFailed, match=message):
            run_json([sys.executable, "-c", code, "--threads", "1"])

    def test_best_is_taken_figure_by_figure(self):
        found = best([report("x", 1, 5, b1=9, b4=2), report("x", 3, 4, b1=8, b4=6)])
        assert found == {"prefill_512": 3, "decode_from_512": 5, "batched_decode": {"1": 9, "4": 6}}


class TestTable:
    def test_shows_rates_and_multiples_of_the_best_other(self):
        machine = Machine(
            headrace=[report("headrace", 300, 50, b1=60, b4=200)], llamacpp=[report("llama.cpp", 120, 40, b1=50, b4=80)]
        )
        text = table(to_json(COMPARISON, run(machine, rounds=1)[0], 3))
        rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("|")]
        assert rows[0] == ["tokens/s", "prefill 512", "decode from 512", "batch of 1", "4"]
        assert rows[2] == ["Headrace int4", "300.0", "50.0", "60.0", "200.0"]
        assert rows[3] == ["llama.cpp q4_0", "120.0", "40.0", "50.0", "80.0"]
        assert rows[4] == ["Headrace int4 / best other", "2.50x", "1.25x", "1.20x", "2.50x"]
        assert "2 threads" in text
        assert "900 Gop/s int8" in text

    def test_a_figure_that_an_engine_lacks_is_a_dash(self):
        machine = Machine(
            headrace=[report("headrace", 300, 50, b1=60, b4=200)], llamacpp=[report("llama.cpp", 120, 40, b1=50)]
        )
        text = table(to_json(COMPARISON, run(machine, rounds=1)[0], 3))
        assert "| llama.cpp q4_0 | 120.0 | 40.0 | 50.0 | - |" in text
        assert text.count("1.20x | - |") == 1


class TestNoise:
    def test_a_quiet_machine_has_none(self):
        assert remarks([QUIET, QUIET], [CpuUse(busy=1.0, steal=0.0)], [34.0, 33.0]) == []

    @pytest.mark.parametrize(
        ("idle", "running", "read", "message"),
        [
            ([CpuUse(busy=0.3, steal=0.0)], [QUIET], [34.0], "other processes used up to 30%"),
            ([QUIET], [CpuUse(busy=0.9, steal=0.1)], [34.0], "the host took up to 10%"),
            ([QUIET], [QUIET], [34.0, 28.0], "28.0 GB/s in one round, 34.0 in another"),
        ],
    )
    def test_each_kind_is_named(self, idle, running, read, message):
        [found] = remarks(idle, running, read)
        assert message in found

    def test_spread(self):
        assert spread([4.0, 3.0, 5.0]) == pytest.approx(0.4)


class FakePeer:
    engine, version, vocab_size = "fake", "1", 100

    def __init__(self, batch_s):
        self.batch_s = batch_s
        self.prompts, self.steps = [], []

    def sequence(self, prompt, num_steps):
        self.prompts.append(prompt)
        self.steps.append(num_steps)
        return 2.0 * len(self.prompts), 1.0 / len(self.prompts)

    def batch(self, prompts, num_steps):
        self.prompts += prompts
        assert num_steps == BATCH_STEPS
        return self.batch_s


class TestProtocol:
    REQUEST = Request(model="m", num_threads=2, batch_sizes=(1, 3), num_rounds=2)

    def test_figures_are_of_the_best_round(self):
        peer = FakePeer(batch_s=0.5)
        found = measure(peer, self.REQUEST)
        # The first call of the three is warm-up; prefill gets slower with each, decode faster.
        assert found["prefill_512"] == pytest.approx(PROMPT_TOKENS / 4.0)
        assert found["decode_from_512"] == pytest.approx(DECODE_STEPS * 3)
        assert found["batched_decode"] == {"1": BATCH_STEPS / 0.5, "3": 3 * BATCH_STEPS / 0.5}
        assert peer.steps[1:] == [DECODE_STEPS] * 2

    def test_no_prompt_comes_twice(self):
        peer = FakePeer(batch_s=0.5)
        measure(peer, self.REQUEST)
        lengths = [len(prompt) for prompt in peer.prompts]
        assert lengths == [BATCH_CONTEXT_TOKENS, PROMPT_TOKENS, PROMPT_TOKENS, *[BATCH_CONTEXT_TOKENS] * 8]
        assert len({tuple(prompt) for prompt in peer.prompts}) == len(peer.prompts)

    def test_an_engine_without_batches_has_none(self):
        assert measure(FakePeer(batch_s=None), self.REQUEST)["batched_decode"] == {}


class TestConfig:
    def test_what_setup_writes_is_read(self, tmp_path):
        models = {"int4": tmp_path / "models" / "x", "int8": tmp_path / "models" / "y"}
        file = tmp_path / "comparison.toml"
        file.write_text(toml(tmp_path / "tiny", 4, {"openvino": (tmp_path / "envs" / "bin", models)}))
        comparison = read_comparison(file)
        assert (comparison.threads, comparison.checkpoint) == (4, tmp_path / "tiny")
        assert [spec.key for spec in comparison.engines] == [
            *("headrace int4", "headrace int8", "headrace none"),
            *("openvino int4", "openvino int8"),
        ]
        assert comparison.engines[-1].python == tmp_path / "envs" / "bin" / "python"
        assert comparison.engines[-1].model == models["int8"]

    def test_paths_are_relative_to_the_file(self, tmp_path):
        file = tmp_path / "comparison.toml"
        file.write_text(
            'checkpoint = "tiny"\n'
            '[[engine]]\nengine = "llamacpp"\nformat = "q4_0"\npython = "env/python"\nmodel = "m"\n'
        )
        [spec] = read_comparison(file).engines
        assert (spec.python, spec.model) == (tmp_path / "env" / "python", tmp_path / "m")

    def test_headrace_takes_part_once_more_without_batch_invariance(self, tmp_path):
        file, entry = tmp_path / "comparison.toml", '[[engine]]\nengine = "headrace"\nformat = "int4"\n'
        file.write_text(f'checkpoint = "tiny"\n{entry}{entry}batch_invariant = false\n')
        assert [spec.key for spec in read_comparison(file).engines] == [
            "headrace int4",
            "headrace int4, not batch invariant",
        ]

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("", "checkpoint is None"),
            ('checkpoint = "x"', "no \\[\\[engine\\]\\]"),
            ('checkpoint = "x"\n[[engine]]\nengine = "other"', "'other' is unknown; allowed: headrace, llamacpp"),
            ('checkpoint = "x"\n[[engine]]\nengine = "headrace"', "format is None"),
            ('checkpoint = "x"\n[[engine]]\nengine = "llamacpp"\nformat = "q4_0"', "model is None"),
            (
                'checkpoint = "x"\nthreads = 0\n[[engine]]\nengine = "headrace"\nformat = "int4"',
                "threads is 0; it must be",
            ),
            (
                'checkpoint = "x"\n[[engine]]\nengine = "headrace"\nformat = "int4"\nbatch_invariant = "no"',
                "batch_invariant is 'no'; it must be",
            ),
            ('checkpoint = "x"\n' + '[[engine]]\nengine = "headrace"\nformat = "int4"\n' * 2, "same name and format"),
        ],
    )
    def test_what_cannot_be_compared_is_refused(self, tmp_path, text, message):
        file = tmp_path / "comparison.toml"
        file.write_text(text)
        with pytest.raises(SystemExit, match=message):
            read_comparison(file)


@pytest.mark.parametrize(("widths", "size"), [((2048, 5632), 128), ((576, 1536), 64), ((96, 160), 32)])
def test_openvino_groups_divide_every_width(tmp_path, widths, size):
    config = dict(zip(("hidden_size", "intermediate_size"), widths, strict=True))
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert openvino_group_size(tmp_path) == size


def test_every_peer_has_a_module():
    folder = Path(__file__).resolve().parents[1] / "bench" / "peers"
    assert all((folder / f"{peer}.py").is_file() for peer in SETUPS)
