"""The benchmark: shapes of its report, what it refuses, and the arithmetic of floors. No speed is asserted."""

import json
from dataclasses import replace
from itertools import groupby

import pytest
import torch
from tiny_model import num_parameters, write_tiny_model

import headrace
from headrace.bench import kernel_rounds
from headrace.bench import limits as limits_module
from headrace.bench.facts import WeightFacts, weight_facts
from headrace.bench.floors import decode_floor, prefill_floor
from headrace.bench.limits import MachineLimits
from headrace.bench.model import BenchSettings, measure_speed
from headrace.bench.rounds import RoundRunner
from headrace.cli.main import main
from headrace.config import MoeConfig, WeightFormat
from headrace.errors import ConfigError, RequestError
from headrace.kernels import KernelChoice, kernel_choice_from, resolve_kernels
from headrace.kernels.reference import machine_ops as torch_machine_ops
from headrace.models.loading import WeightFormats

FACTS = WeightFacts(
    num_parameters=1_100, weight_bytes=2_200, num_layer_parameters=800, num_head_parameters=100, bytes_per_step=1_800
)
LIMITS = MachineLimits(
    read_gb_per_s=2.0, read_buffer_bytes=1, multiply_gops={"bfloat16": 10.0, "float32": 4.0}, num_threads=1
)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(write_tiny_model(tmp_path_factory.mktemp("models") / "tiny"))


@pytest.fixture(scope="module")
def llm(model):
    return headrace.LLM(model, max_num_seqs=4)


@pytest.fixture
def quick_limits(monkeypatch):
    """Limits of a tenth of a second: their size is not what is tested."""
    monkeypatch.setattr(limits_module, "_BUFFER_BYTES", {"cpu": 2**20})
    monkeypatch.setattr(torch_machine_ops, "_SHAPE", (16, 16, 16))


@pytest.fixture
def run(capsys, quick_limits):
    def call(*argv, command=("bench", "model")):
        code = main([*command, *map(str, argv)])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


class TestCommand:
    def test_json_names_every_figure(self, run, model):
        code, out, err = run(
            *("--model", model, "--json", "--rounds", 1, "--prefill-tokens", 20, 30, "--context-lens", 20),
            *("--decode-tokens", 3, "--batch-sizes", 1, 3, "--threads", 1),
        )
        report = json.loads(out)
        assert (code, err) == (0, "")
        assert min(report["prefill_20"], report["prefill_30"], report["decode_from_20"]) > 0
        assert "decode_from_30" not in report
        assert report["batched_decode"].keys() == {"1", "3"}
        assert report["limits"]["floors"].keys() == {
            "prefill_20",
            "prefill_30",
            "decode_from_20",
            "batched_decode_1",
            "batched_decode_3",
        }
        assert report["limits"]["multiply_gops"].keys() == {"float32"}
        assert (report["engine"], report["model"], report["threads"]) == ("headrace", model, 1)
        assert report["peak_memory_bytes"] > report["weight_bytes"] > 0
        assert report["formats"] == {"linear": "float32", "dense": "float32", "kv_cache": "float32"}
        assert report["machine"]["cpu"]
        # Builds for GPUs name themselves so in the module only.
        assert report["versions"]["torch"].partition("+")[0] == torch.__version__.partition("+")[0]
        assert report["remarks"] == []

    @pytest.mark.parametrize("command", [("bench",), ("bench", "model")])
    def test_table_shows_figures_and_limits(self, run, model, command):
        code, out, _ = run(
            *("--model", model, "--rounds", 1, "--decode-tokens", 2, "--batch-sizes", 2, "--threads", 1),
            command=command,
        )
        assert code == 0
        for text in ("prefill 512", "decode from 512", "batch of 2", "share of limit", "GB/s"):
            assert text in out
        assert any(line.split() == ["threads", "1"] for line in out.splitlines())

    def test_defaults_give_way_to_a_short_model_and_say_so(self, run, model):
        code, out, _ = run(
            *("--model", model, "--json", "--max-model-len", 40, "--max-num-seqs", 2, "--rounds", 1),
            *("--decode-tokens", 4),
        )
        report = json.loads(out)
        assert code == 0
        assert "prefill_34" in report
        assert "decode_from_34" in report
        assert report["batched_decode"].keys() == {"1"}
        assert len(report["remarks"]) == 3

    @pytest.mark.parametrize(
        ("argv", "message"),
        [
            (["--prefill-tokens", "200"], "--prefill-tokens 200 and the decoded tokens do not fit max_model_len 100"),
            (["--context-lens", "60"], "give at most 50"),
            (["--decode-tokens", "99"], "give fewer --decode-tokens"),
            (["--batch-sizes", "64"], "--batch-sizes 64 is above --max-num-seqs"),
            (["--rounds", "0"], "--rounds is 0; it must be at least 1"),
            (["--batch-sizes", "0"], "--batch-sizes is 0"),
        ],
    )
    def test_what_does_not_fit_is_refused(self, run, model, argv, message):
        code, out, err = run("--model", model, "--max-model-len", "100", *argv)
        assert (code, out) == (2, "")
        assert message in err
        assert err.count("\n") == 1


class TestRounds:
    def test_counts_tokens_and_leaves_nothing_behind(self, llm):
        times = RoundRunner(llm.engine).run(num_seqs=3, context_len=10, num_steps=5)
        assert (times.num_prompt_tokens, times.num_decode_tokens) == (30, 15)
        assert times.prefill_s > 0
        assert times.decode_s > 0
        assert times.step_s == pytest.approx(times.decode_s / 5)
        assert not llm.engine.has_unfinished
        llm.engine.check_integrity()

    def test_prompts_are_never_in_the_cache(self, llm):
        runner = RoundRunner(llm.engine)
        before = llm.engine.metrics().prefix_hit_tokens
        for _ in range(3):
            runner.run(num_seqs=1, context_len=40, num_steps=1)
        assert llm.engine.metrics().prefix_hit_tokens == before

    def test_repeated_prompts_come_from_the_cache_from_the_second_round_on(self, llm):
        runner = RoundRunner(llm.engine, seed=9, repeats_prompts=True)
        hits = []
        for _ in range(3):
            before = llm.engine.metrics().prefix_hit_tokens
            assert runner.run(num_seqs=2, context_len=40, num_steps=2).num_decode_tokens == 4
            hits.append(llm.engine.metrics().prefix_hit_tokens - before)
        assert hits == [0, 64, 64]

    def test_a_cached_prompt_is_an_error(self, llm):
        """A second runner with the same random numbers would measure the cache instead of the model."""
        RoundRunner(llm.engine, seed=5).run(num_seqs=1, context_len=40, num_steps=1)
        with pytest.raises(RequestError, match="came from the cache"):
            RoundRunner(llm.engine, seed=5).run(num_seqs=1, context_len=40, num_steps=1)

    def test_a_cache_too_small_is_an_error(self, model):
        llm = headrace.LLM(model, num_blocks=6, max_num_seqs=4, max_model_len=96)
        with pytest.raises(ConfigError, match="need 12 KV cache blocks, and there are 6"):
            RoundRunner(llm.engine).run(num_seqs=4, context_len=16, num_steps=30)

    def test_a_prompt_of_several_steps(self, model):
        llm = headrace.LLM(model, max_num_batched_tokens=16, max_num_seqs=4)
        times = RoundRunner(llm.engine).run(num_seqs=2, context_len=50, num_steps=4)
        assert times.num_decode_tokens == 8

    def test_speed_is_the_best_of_the_rounds(self, llm):
        started = []
        settings = BenchSettings(
            prefill_tokens=(8,), context_lens=(12,), decode_tokens=2, batch_sizes=(2,), num_rounds=2
        )
        speed = measure_speed(llm.engine, settings, started.append)
        assert (speed.prefill_s.keys(), speed.decode_step_s.keys(), speed.batch_step_s.keys()) == ({8}, {12}, {2})
        names = ("8 tokens", "12 tokens", "batch of 2")
        assert started == ["warm-up", *(f"{name}, round {i} of 2" for name in names for i in (1, 2))]


class TestFacts:
    def test_equal_what_is_loaded(self, llm):
        model = llm.engine.model
        facts = weight_facts(model.config, model.formats, model.kernels)
        table = model.config.vocab_size * model.config.hidden_size
        assert facts.num_parameters == num_parameters(model.config.vocab_size)
        # The vocabulary, which embedding and head have, is the one dimension that a packed layout may pad here.
        table_bytes = model.kernels.weight_num_bytes(
            WeightFormat.FLOAT32, model.config.vocab_size, model.config.hidden_size
        )
        assert facts.weight_bytes == model.weight_bytes == 4 * (facts.num_parameters - 2 * table) + 2 * table_bytes
        assert facts.num_head_parameters == table
        assert facts.bytes_per_step == facts.weight_bytes - table_bytes - 4 * model.config.hidden_size

    @pytest.mark.parametrize("quantize", ["int8", "int4"])
    def test_quantized_bytes_equal_what_is_loaded(self, model, quantize):
        loaded = headrace.LLM(model, quantize=quantize).engine.model
        assert weight_facts(loaded.config, loaded.formats, loaded.kernels).weight_bytes == loaded.weight_bytes

    def test_of_experts_only_the_chosen_count(self, llm):
        config, formats = llm.engine.model.config, llm.engine.model.formats
        moe = MoeConfig(num_experts=4, num_experts_per_token=2, intermediate_size=64)
        sparse = replace(config, layers=tuple(replace(layer, moe=moe) for layer in config.layers))
        kernels = resolve_kernels(KernelChoice.REFERENCE)
        dense_facts, facts = weight_facts(config, formats, kernels), weight_facts(sparse, formats, kernels)
        expert, router = 3 * config.hidden_size * 64, config.hidden_size * 4
        num_layers = config.num_hidden_layers
        assert facts.num_layer_parameters == dense_facts.num_layer_parameters + num_layers * (expert + router)
        assert facts.num_parameters == dense_facts.num_parameters + num_layers * (3 * expert + router)


class TestFloors:
    def test_decode_reads_the_weights_once_for_all_sequences(self):
        floor = decode_floor(3, 10, kv_token_bytes=4, facts=FACTS, limits=LIMITS)
        assert floor.memory_s == pytest.approx((1_800 + 3 * 10 * 4) / 2e9)
        assert floor.compute_s == pytest.approx(2 * 3 * 900 / 10e9)
        assert (floor.floor_s, floor.bound) == (floor.memory_s, "memory")

    def test_prefill_counts_the_head_once(self):
        floor = prefill_floor(512, FACTS, LIMITS)
        assert floor.compute_s == pytest.approx(2 * (800 * 512 + 100) / 10e9)
        assert floor.bound == "compute"
        assert floor.share(2 * floor.floor_s) == pytest.approx(0.5)


class TestLimits:
    @pytest.mark.parametrize(
        ("choice", "linear", "names"),
        [
            (KernelChoice.REFERENCE, WeightFormat.INT4, {"bfloat16", "float32"}),
            (KernelChoice.CPU, WeightFormat.INT4, {"int8", "bfloat16", "float32"}),
            (KernelChoice.CPU, WeightFormat.BFLOAT16, {"bfloat16", "float32"}),
        ],
    )
    def test_are_of_what_the_weights_are_multiplied_as(self, quick_limits, choice, linear, names):
        heard = []
        formats = WeightFormats(dense=WeightFormat.BFLOAT16, linear=linear)
        found = limits_module.measure_limits(resolve_kernels(choice), formats, 3, heard.append)
        assert found.multiply_gops.keys() == names
        assert min(found.read_gb_per_s, *found.multiply_gops.values()) > 0
        assert (found.read_buffer_bytes, found.num_threads) == (2**20, 3)
        assert found.best_gops == max(found.multiply_gops.values())
        assert len(heard) == 1 + len({linear, WeightFormat.BFLOAT16, WeightFormat.FLOAT32})


@pytest.fixture
def _little_memory(monkeypatch):
    """What is tested here is what is reported, not how fast anything is."""
    monkeypatch.setattr(kernel_rounds, "_WORKING_SET_BYTES", 2**20)
    monkeypatch.setattr(kernel_rounds, "_READ_BUFFER_BYTES", {"cpu": 2**20})
    monkeypatch.setattr(kernel_rounds, "_MIN_S", 0.0)
    monkeypatch.setattr(kernel_rounds, "_NUM_ROUNDS", 1)
    monkeypatch.setattr("headrace.kernels.cpu.machine_ops._MULTIPLY_PASSES", 1)


@pytest.mark.usefixtures("_little_memory")
def test_bench_kernels_puts_every_kernel_beside_its_limit(capsys):
    arguments = ["--shape", "smollm-135m", "--formats", "int4", "--rows", "1", "3", "--contexts", "40", "--json"]
    assert main(["bench", "kernels", *arguments, "--threads", "1"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert [(f["layer"], f["num_rows"]) for f in report["linear"]][:4] == [("qkv", 1), ("qkv", 3), ("o", 1), ("o", 3)]
    assert {f["out_features"] for f in report["linear"]} == {960, 576, 3072, 32000}
    for figure in report["linear"] + report["attention"]:
        floors = figure["num_bytes"] / figure["read_bytes_per_s"], figure["num_ops"] / figure["ops_per_s"]
        assert figure["floor_s"] == pytest.approx(max(floors))
        assert figure["share"] == pytest.approx(figure["floor_s"] / figure["seconds"])
    assert {f["num_new"] for f in report["attention"]} == {1, 512}
    assert report["linear"][1]["num_ops"] == 2 * 3 * 960 * 576


def test_a_kernels_limits_are_those_of_its_own_rounds():
    """Peaks measured once, before all kernels, gave shares of 180 % on a machine that was busy only then."""
    events = []

    class Machine:
        def read_bytes_per_s(self, buffer_bytes):
            events.append("read")
            return 10.0 * events.count("read")

        def multiply_ops_per_s(self, weight_format):
            events.append(weight_format)
            return "int8", 70.0 / events.count(weight_format)

    kernels = replace(resolve_kernels(KernelChoice.REFERENCE), machine=Machine())
    runs = [lambda i: events.append("a"), lambda i: events.append("b")]
    times = kernel_rounds.time_rounds(kernels, runs, 1, WeightFormat.INT4)
    order = [event for event, _ in groupby(events)]
    assert order[-12:] == ["read", "a", "b", WeightFormat.INT4] * 3
    assert (times.read_bytes_per_s, times.ops_per_s) == (30.0, 70.0)
    assert len(times.seconds) == 2


@pytest.mark.usefixtures("_little_memory")
def test_bench_kernels_as_tables(capsys):
    assert main(["bench", "kernels", "--shape", "smollm-135m", "--formats", "int8", "--rows", "2", "--contexts"]) == 0
    out = capsys.readouterr().out
    assert "M = 2" in out
    assert "gate_up" in out
    assert "attention" not in out


def test_kernels_are_replayed_and_each_copy_in_its_turn():
    """Asked for from Python, a small kernel was charged with the asking."""
    kernels = resolve_kernels(kernel_choice_from())
    if kernels.dataflow is None:
        pytest.skip("only native kernels are recorded")
    asked, one, copies = [], torch.ones(1, 16), [torch.zeros(1, 16) for _ in range(3)]

    def run(i):
        asked.append(i)
        kernels.add_(copies[i], one)

    recorded = kernel_rounds._Recorded(kernels, run, 3)
    recorded(1)
    assert asked == [0, 1, 2]
    assert [copy[0, 0].item() for copy in copies] == [1, 2, 1]


def test_bench_kernels_refuses_sizes_below_one(capsys):
    assert main(["bench", "kernels", "--rows", "0"]) == 2
    assert "--rows" in capsys.readouterr().err


@pytest.mark.parametrize(("device", "message"), [("gpu", "device is 'gpu'"), ("cuda:99", "cuda:99")])
def test_bench_kernels_refuses_devices_that_are_not_there(capsys, device, message):
    assert main(["bench", "kernels", "--device", device]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_bench_kernels_on_a_gpu(capsys, monkeypatch):
    monkeypatch.setattr(kernel_rounds, "_READ_BUFFER_BYTES", {"cuda": 2**28})
    arguments = ["--shape", "smollm-135m", "--rows", "1", "64", "--contexts", "40", "--json"]
    assert main(["bench", "kernels", "--device", "cuda", *arguments]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["device"] == torch.cuda.get_device_name(0)
    assert {f["weight_format"] for f in report["linear"]} == {"float32", "bfloat16", "int8", "int4"}
    assert all(f["seconds"] > 0 for f in report["linear"] + report["attention"])
