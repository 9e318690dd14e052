"""The command that tests and measures the GPU backend: all of its code runs, and nothing stops it half way."""

import ast
import inspect
import json
import math
import os
import subprocess
import sys
import time
from dataclasses import replace
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")
pytest.importorskip("transformers", reason="transformers, which is measured too, is not installed")

from triton_device import DEVICE, IS_INTERPRETED

from headrace.bench.ablation_variants import VARIANTS
from headrace.bench.kernels import ModelShape
from headrace.kernels import KernelChoice, resolve_kernels
from scripts.gpu_check import attention, attention_flashinfer, attention_peers, flashinfer_stand_in, linears, report
from scripts.gpu_check import peers as engines
from scripts.gpu_check.__main__ import main
from scripts.gpu_check.checkpoint import random_checkpoint
from scripts.gpu_check.context import Context
from scripts.gpu_check.figures import Figure, Results, Trouble, entries_of, figure_entry, merged, trouble_entry
from scripts.gpu_check.scale import DRY, FULL
from scripts.gpu_check.suites import outcomes
from scripts.gpu_check.suites import test_files as files_to_test
from scripts.gpu_check.supervisor import Settings, compile_units, run_units
from scripts.gpu_check.targets import verdicts
from scripts.gpu_check.units import STAGES, Unit
from scripts.gpu_check.worker import lines_of
from scripts.gpu_tables import main as write_tables
from scripts.gpu_tables import resources

ROOT = Path(__file__).parents[1]


def figure(group: str, seconds: float = 1.0, **labels: str | int) -> Figure:
    return Figure(group=group, labels=labels, seconds=seconds)


def results_of(*figures: Figure) -> Results:
    results = Results()
    for found in figures:
        results.add(figure_entry(found))
    return results


def merged_again(results: Results) -> Results:
    """Through a file, as one run goes on with another's."""
    again = Results()
    for entry in entries_of(json.loads(json.dumps(results.to_json()))):
        again.add(entry)
    return again


def dry_stages() -> list[str]:
    """An ablation takes kernels that have something to switch off."""
    kernels = resolve_kernels(KernelChoice.TRITON, device=DEVICE)
    return [stage for stage in STAGES if stage != "ablation" or kernels.dataflow is not None]


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("gpu_check")


def test_tables_of_attention_name_the_fastest_that_is_right() -> None:
    place = {"heads": "alike", "batch": 1, "context": 128}
    results = results_of(
        figure("prefill attention", 3e-6, by="synchronized", **place),
        replace(figure("prefill attention", 1e-6, by="lazy", **place), error=0.5, tolerance=1e-2),
        figure("prefill attention", 2e-6, by="library", **place),
    )
    assert "| 1 | 128 | 3.0 | 1.0 WRONG | 2.0 | library |" in report.markdown(results)


NOT_THERE = ("llguidance", "fastapi", "pydantic", "uvicorn", "httptools", "uvloop", "headrace._native")
"""What serves, what structures outputs and what runs on CPUs: a GPU with torch and transformers need not have these."""


@pytest.fixture(scope="module")
def data(out: Path) -> dict[str, Any]:
    """Of a dry run of everything, whose processes find on PYTHONPATH that some packages are not installed."""
    folders = ["--out", str(out), "--folder", str(out / "caches"), "--models", str(out / "models")]
    carried = out / "carried"
    carried.mkdir()
    hidden = f"import sys\nopen({str(out / 'started')!r}, 'a').write('.')\nsys.modules |= dict.fromkeys({NOT_THERE})\n"
    (carried / "sitecustomize.py").write_text(hidden)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(carried))
        code = main(["--dry-run", *folders, "--stages", ",".join(dry_stages())])
    found: dict[str, Any] = json.loads((out / "results.json").read_text())
    assert [trouble for trouble in found["troubles"] if trouble["is_failure"]] == []
    assert code == 0
    return found


@pytest.mark.skipif(not IS_INTERPRETED, reason="runs in Triton's interpreter; on a GPU the command itself is run")
@pytest.mark.timeout(240)
class TestDryRun:
    """Code that was never executed fails on the one machine that it was written for."""

    def test_every_unit_gives_figures(self, data) -> None:
        groups = {found["group"] for found in data["figures"]}
        assert groups == {
            *("limit", "linear", "decode attention", "prefill attention", "chunk attention"),
            *("decode", "prefill", "agreement"),
            *({"ablation"} & {*dry_stages()}),
        }
        assert all(found["seconds"] > 0 for found in data["figures"])
        variants = {found["labels"]["variant"] for found in data["figures"] if found["group"] == "ablation"}
        assert not variants or variants == {variant.key for variant in VARIANTS}
        for group in ("decode attention", "prefill attention", "chunk attention"):
            by = {found["labels"]["by"] for found in data["figures"] if found["group"] == group}
            assert {"synchronized", "torch SDPA", "FlexAttention", "FlashInfer"} <= by
            assert ("library" in by) == (group != "decode attention")

    def test_every_process_takes_packages_from_pythonpath(self, data, out) -> None:
        assert len((out / "started").read_text()) >= len(data["tests"]) + 1

    def test_what_was_computed_was_compared(self, data) -> None:
        """Peers too: what they compute must be the same."""
        for group in ("linear", "decode attention", "prefill attention", "chunk attention", "agreement"):
            errors = [found["error"] for found in data["figures"] if found["group"] == group]
            assert errors
            assert max(errors) < 1e-3

    def test_the_table_comes_as_text_and_as_markdown(self, data, out) -> None:
        results = merged([out / "results.json"])
        assert report.text(results).splitlines()[-1].startswith("prefill: times transformers")
        fragment = (out / "gpu.md").read_text()
        assert fragment == report.markdown(results)
        assert "| transformers compiled | float32 |" in fragment


def settings(tmp_path: Path, deadline_s: float = 60.0) -> Settings:
    command = (sys.executable, str(Path(__file__).with_name("fake_gpu_worker.py")))
    return Settings(
        folder=tmp_path,
        models=tmp_path,
        out=tmp_path,
        deadline_s=time.time() + deadline_s,
        is_dry=True,
        command=command,
    )


def supervised(tmp_path: Path, *names: str, limit_s: float = 30.0, deadline_s: float = 60.0) -> Results:
    results = Results()
    units = {name: Unit(name=name, stage="limits", limit_s=limit_s, run=lambda context: iter(())) for name in names}
    run_units(units, results, settings(tmp_path, deadline_s), lambda line: None, lambda: None)
    return results


class TestSupervisor:
    def test_goes_on_after_a_crash_and_keeps_what_was_found_before_it(self, tmp_path) -> None:
        results = supervised(tmp_path, "first", "crashes", "last")
        assert [f.labels["name"] for f in results.of("some")] == ["first", "before the crash", "last"]
        assert results.done == ["first", "last"]
        assert list(results.troubles) == ["crashes"]
        assert "an illegal memory access" in results.troubles["crashes"].message

    def test_ends_what_hangs(self, tmp_path) -> None:
        results = supervised(tmp_path, "hangs", "last", limit_s=1.0)
        assert results.troubles["hangs"].message == "ended after 1 s"
        assert results.done == ["last"]

    def test_ends_with_its_time(self, tmp_path, monkeypatch) -> None:
        monkeypatch.setattr("scripts.gpu_check.supervisor._GRACE_S", 0.0)
        results = supervised(tmp_path, "hangs", deadline_s=1.0)
        assert results.troubles["hangs"].message == "ended, since the time of the whole run was over"

    def test_starts_another_worker_when_the_device_is_broken(self, tmp_path) -> None:
        results = supervised(tmp_path, "breaks the device", "fails", "last")
        assert results.done == ["breaks the device", "fails", "last"]
        assert results.troubles["fails"].message == "ValueError: no"

    def test_gives_up_when_workers_do_not_begin(self, tmp_path) -> None:
        results = supervised(tmp_path, "first", "never begins", "last")
        assert results.done == ["first"]
        assert "no such device" in results.troubles["worker"].message

    def test_what_compiles_ahead_is_ended_in_time(self, tmp_path) -> None:
        said: list[str] = []
        compile_units(["first", "hangs", "last"], settings(tmp_path), 2, 1.5, said.append)
        assert said[0].endswith("1 of 2 processes had not finished")

    def test_half_a_line_waits_for_its_other_half(self, tmp_path) -> None:
        file = tmp_path / "lines"
        file.write_bytes(b'{"a": 1}\n{"b"')
        entries, place = lines_of(file, 0)
        assert entries == [{"a": 1}]
        file.write_bytes(b'{"a": 1}\n{"b": 2}\n')
        assert lines_of(file, place) == ([{"b": 2}], 18)


class TestMerging:
    def test_later_figures_replace_earlier_ones(self, tmp_path) -> None:
        files = []
        for i, found in enumerate(
            [
                [figure("limit", 1.0, name="copy"), figure("limit", 1.0, name="sum")],
                [figure("limit", 2.0, name="copy")],
            ]
        ):
            files.append(tmp_path / f"{i}.json")
            files[-1].write_text(json.dumps(results_of(*found).to_json()))
        results = merged(files)
        assert {f.labels["name"]: f.seconds for f in results.of("limit")} == {"copy": 2.0, "sum": 1.0}

    def test_what_failed_once_and_then_succeeded_is_no_failure(self, tmp_path) -> None:
        first, second = Results(), Results()
        for unit in ("linear", "linear: cuBLAS", "model"):
            first.add(trouble_entry(Trouble(unit=unit, message="no")))
        second.add({"kind": "done", "unit": "linear"})
        for name, results in (("1", first), ("2", second)):
            (tmp_path / name).write_text(json.dumps(results.to_json()))
        assert list(merged([tmp_path / "1", tmp_path / "2"]).troubles) == ["model"]


@pytest.fixture
def context(tmp_path) -> Context:
    return Context(
        device=torch.device("cpu"),
        dtype=torch.float32,
        scale=DRY,
        folder=tmp_path,
        deadline_s=time.time() + 60,
    )


class TestErrors:
    def test_are_relative_to_the_reference(self, context) -> None:
        expected = torch.tensor([3.0, 4.0])
        assert context.error(lambda: torch.tensor([3.0, 5.0]), expected) == pytest.approx(0.2)

    def test_no_number_is_never_right(self, context) -> None:
        error = context.error(lambda: torch.tensor([3.0, math.nan]), torch.tensor([3.0, 4.0]))
        assert error == math.inf
        assert not replace(figure("some"), error=error, tolerance=1e-2).is_right
        assert replace(figure("some"), error=1e-3, tolerance=1e-2).is_right

    def test_one_that_fails_leaves_the_others(self, context) -> None:
        def fails() -> torch.Tensor:
            raise ValueError("no such shape")

        failed = []
        context.report = lambda part, message, is_failure: failed.append((part, message, is_failure))
        expected = torch.ones(2)
        assert context.errors({"a": [fails], "b": [lambda: torch.ones(2)]}, expected) == {"b": 0.0}
        assert context.race({"a": [fails], "b": [lambda: torch.ones(2)]}).keys() == {"b"}
        assert failed == 2 * [("a", "ValueError: no such shape", True)]


@pytest.fixture
def failed(context, monkeypatch) -> dict[str, str]:
    """What is reported as a failure, by part; the kernels are those of the reference, which are there everywhere."""
    monkeypatch.setenv("HEADRACE_KERNELS", KernelChoice.REFERENCE.value)
    found: dict[str, str] = {}
    context.report = lambda part, message, is_failure: found.update({part: message} if is_failure else {})
    return found


class TestPeers:
    """One that computes something else would be beaten, or would win, by doing other work."""

    @pytest.mark.parametrize("phase", ["decode", "prefill", "chunk"])
    def test_that_are_right_are_timed(self, context, failed, phase) -> None:
        found = {figure.labels["by"]: figure for figure in attention.measure("grouped", phase)(context)}
        assert {"synchronized", "torch SDPA", "FlexAttention", "FlashInfer"} <= found.keys()
        assert all(figure.is_timed and figure.is_right for figure in found.values())
        assert not failed

    def test_a_mask_of_another_corner_is_named_in_the_place_of_a_time(self, context, failed, monkeypatch) -> None:
        monkeypatch.setattr(attention_peers, "_causal", lambda case: {"is_causal": True})
        found = {figure.labels["by"]: figure for figure in attention.measure("grouped", "chunk")(context)}
        wrong = found.pop("torch SDPA")
        assert not wrong.is_timed
        assert wrong.error > 0.1
        assert all(figure.is_timed and figure.is_right for figure in found.values())
        said = f"differs from the reference by {wrong.error:.2g}"
        assert failed == {"torch SDPA": said}
        results = results_of(*found.values(), wrong)
        assert f"| {said} |" in report.markdown(results)
        assert report.markdown(merged_again(results)) == report.markdown(results)
        [right] = [verdict for verdict in verdicts(results) if verdict.name.startswith("outputs compared")]
        assert (right.value, right.where) == ("0", f"of {len(found)}"), "the backend's own are right"

    @pytest.mark.parametrize("weight_format", DRY.formats)
    def test_a_linear_layer_is_held_to_the_weights_that_it_has(self, context, failed, weight_format) -> None:
        """Those that were not quantized."""
        found = list(linears.measure(weight_format, "down")(context))
        assert {figure.labels["arm"] for figure in found} == {"chosen", "cuBLAS"}
        assert all(figure.is_timed and figure.is_right for figure in found)
        assert not failed

    def test_a_wrong_linear_layer_has_no_time_and_no_ratio(self, context, failed, monkeypatch) -> None:
        wrong = SimpleNamespace(linear=lambda x, weight: x @ weight.T * 1.001)
        monkeypatch.setattr(linears, "F", wrong)
        found = {figure.labels["arm"]: figure for figure in linears.measure("float32", "down")(context)}
        said = "differs from the reference by 0.001"
        assert failed == {"cuBLAS": said}
        assert (found["chosen"].is_timed, found["cuBLAS"].is_timed) == (True, False)
        table = report.markdown(results_of(*found.values()))
        rows = {line.split(" | ")[1]: line for line in table.splitlines() if line.startswith("| down")}
        assert said in rows["cuBLAS"]
        assert "(" not in rows["chosen"]

    def test_one_that_fails_ends_nothing(self, context, failed, monkeypatch) -> None:
        def fails(*arguments, **options) -> torch.Tensor:
            raise RuntimeError("no kernel for this GPU")

        monkeypatch.setattr(attention_peers.F, "scaled_dot_product_attention", fails)
        monkeypatch.setattr(attention_peers.CompiledFlex, "calls", fails)
        monkeypatch.setattr(flashinfer_stand_in.BatchDecodeWithPagedKVCacheWrapper, "plan", fails)
        found = [figure.labels["by"] for figure in attention.measure("grouped", "decode")(context)]
        assert found == [scheme.value for scheme in context.kernels.softmax_schemes]
        peers = ("torch SDPA", "FlexAttention", "FlashInfer")
        assert failed == dict.fromkeys(peers, "RuntimeError: no kernel for this GPU")

    def test_kernels_that_are_compiled_ahead_give_no_figure(self, context, failed, monkeypatch) -> None:
        monkeypatch.setattr(attention_peers, "_causal", lambda case: {"is_causal": True})
        context.compiles_only = True
        assert list(attention.measure("grouped", "chunk")(context)) == []

    @pytest.mark.parametrize("tolerance", [1e-3, -1.0])
    def test_a_compiled_model_is_held_to_the_one_it_was_compiled_from(
        self, context, failed, monkeypatch, tolerance
    ) -> None:
        monkeypatch.setattr(engines, "_LOGITS_TOLERANCE", tolerance)
        [found] = engines.measure(engines.COMPILED)(context)
        assert found.is_timed == found.is_right == (tolerance > 0)
        assert list(failed) == ["transformers compiled"] * (tolerance < 0)

    def test_another_peer_is_what_an_engine_is_compared_with(self) -> None:
        labels = {"format": "bfloat16", "batch": 1, "context": 512}
        results = results_of(
            figure("decode", 1.0, by="headrace", **labels),
            replace(figure("decode", math.inf, by="transformers compiled", **labels), error=0.3, tolerance=0.05),
        )
        [compiled] = [verdict for verdict in verdicts(results) if verdict.name.endswith("transformers, compiled")]
        assert compiled.is_met is None
        assert "| differs from the reference by 0.3 |" in report.markdown(results)


class TestFlashInfer:
    """Its calls, to a stand-in that takes and refuses what it does."""

    def measured(self, context: Context, phase: str) -> dict[str, Figure]:
        return {figure.labels["by"]: figure for figure in attention.measure("grouped", phase)(context)}

    def test_is_left_out_where_it_is_not_installed(self, context, failed) -> None:
        context.scale = replace(DRY, flashinfer="flashinfer_is_not_here")
        assert "FlashInfer" not in self.measured(context, "decode")
        assert not failed

    @pytest.mark.parametrize("phase", ["decode", "prefill", "chunk"])
    def test_reads_the_pages_of_its_sequence(self, context, failed, monkeypatch, phase) -> None:
        """In another order they hold the same tokens, and are another context."""
        table = attention_flashinfer._page_table
        monkeypatch.setattr(
            attention_flashinfer,
            "_page_table",
            lambda *arguments: tuple(x.flip(0) if i == 1 else x for i, x in enumerate(table(*arguments))),
        )
        found = self.measured(context, phase)
        assert not found["FlashInfer"].is_timed
        assert found["torch SDPA"].is_timed
        assert failed.keys() == {"FlashInfer"}

    def test_groups_that_cuda_cores_are_not_compiled_for(self, context, failed) -> None:
        """It is told to use tensor cores for them."""
        shape = ModelShape(hidden_size=80, intermediate_size=48, num_heads=10, num_kv_heads=2, vocab_size=160)
        context.scale = replace(DRY, grouped=shape)
        assert self.measured(context, "decode")["FlashInfer"].is_timed
        assert not failed

    def test_what_it_does_not_write_is_no_number(self, context, failed, monkeypatch) -> None:
        monkeypatch.setattr(flashinfer_stand_in._Pages, "attend", lambda self, q, cache, bounds, out, causal: out)
        assert self.measured(context, "decode")["FlashInfer"].error == math.inf

    def test_its_kernels_are_kept_with_the_run_or_come_with_it(self, tmp_path, monkeypatch) -> None:
        monkeypatch.delenv("FLASHINFER_WORKSPACE_BASE", raising=False)
        assert settings(tmp_path).environment()["FLASHINFER_WORKSPACE_BASE"] == str(tmp_path / "flashinfer")
        monkeypatch.setenv("FLASHINFER_WORKSPACE_BASE", "/carried")
        assert settings(tmp_path).environment()["FLASHINFER_WORKSPACE_BASE"] == "/carried"

    @pytest.mark.skipif(find_spec("flashinfer") is None, reason="FlashInfer is not installed")
    @pytest.mark.parametrize("name", ["BatchDecodeWithPagedKVCacheWrapper", "BatchPrefillWithPagedKVCacheWrapper"])
    @pytest.mark.parametrize("method", ["__init__", "plan", "run"])
    def test_the_stand_in_has_parameters_of_the_one_that_is_installed(self, name, method) -> None:
        positional, named = flashinfer_parameters(name, method)
        _, *parameters = inspect.signature(getattr(getattr(flashinfer_stand_in, name), method)).parameters.values()
        defaults = {p.name: None if p.default is p.empty else repr(p.default) for p in parameters}
        in_order = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
        assert in_order == positional[: len(in_order)]
        assert defaults.items() <= named.items()


def flashinfer_parameters(name: str, method: str) -> tuple[list[str], dict[str, str | None]]:
    """Of a method of the FlashInfer that is installed, from its source, since its import takes a GPU: those that may be
    given by position, and the default of each as it is written."""
    [folder] = find_spec("flashinfer").submodule_search_locations
    source = Path(folder, "decode.py" if "Decode" in name else "prefill.py").read_text()
    [found] = [node for node in ast.parse(source).body if isinstance(node, ast.ClassDef) and node.name == name]
    # The last of those with one name: overloads come before it.
    methods = {node.name: node.args for node in found.body if isinstance(node, ast.FunctionDef)}
    arguments = methods[method]
    positional = arguments.args[1:]
    if arguments.kwarg is not None:
        arguments = methods[f"_{method}_impl"]  # to which all is handed on
    names = [argument.arg for argument in (*arguments.args[1:], *arguments.kwonlyargs)]
    given = [None if node is None else ast.unparse(node) for node in (*arguments.defaults, *arguments.kw_defaults)]
    return [a.arg for a in positional], dict(zip(names, [None] * (len(names) - len(given)) + given, strict=True))


class TestTargets:
    def verdict(self, results: Results, start: str):
        [found] = [verdict for verdict in verdicts(results) if verdict.name.startswith(start)]
        return found

    def test_what_was_not_measured_is_not_met(self) -> None:
        assert {verdict.is_met for verdict in verdicts(Results())} == {None}

    @pytest.mark.parametrize(("seconds", "is_met"), [(1.17, True), (1.18, False)])
    def test_the_worst_layer_of_few_rows_counts(self, seconds, is_met) -> None:
        labels = {"format": "bfloat16", "arm": "chosen"}
        results = results_of(
            replace(figure("limit", name="copy"), num_bytes=1000),
            replace(figure("linear", layer="o", rows=1, **labels), num_bytes=1000),
            replace(figure("linear", seconds, layer="down", rows=16, **labels), num_bytes=1000),
            # What the target is not about: more rows, other formats, an implementation that was forced.
            replace(figure("linear", 9.0, layer="o", rows=32, **labels), num_bytes=1000),
            replace(figure("linear", 9.0, layer="o", rows=1, format="int8", arm="chosen"), num_bytes=1000),
            replace(figure("linear", 9.0, layer="o", rows=1, format="bfloat16", arm="gemv"), num_bytes=1000),
        )
        found = self.verdict(results, "linear layers")
        assert (found.is_met, found.where) == (is_met, "down 16 bfloat16 chosen")

    @pytest.mark.parametrize(("sdpa_s", "value"), [(4.0, "4.00"), (6.0, "5.00")])
    def test_the_fastest_peer_counts(self, sdpa_s, value) -> None:
        labels = {"format": "bfloat16", "batch": 1, "context": 512}
        results = results_of(
            figure("decode", 1.0, by="headrace", **labels),
            figure("decode", 5.0, by="transformers eager", **labels),
            figure("decode", sdpa_s, by="transformers sdpa", **labels),
        )
        found = self.verdict(results, "batch 1 decode: times transformers, op by op")
        assert (found.value, found.is_met) == (value, value == "5.00")

    def test_prefill_has_a_best_and_a_worst_length(self) -> None:
        ours = [figure("prefill", 1.0, by="headrace", format="bfloat16", tokens=n) for n in (128, 512)]
        peer = [
            figure("prefill", s, by="transformers sdpa", format="bfloat16", tokens=n) for n, s in ((128, 0.9), (512, 2))
        ]
        results = results_of(*ours, *peer)
        best = self.verdict(results, "prefill: times transformers, op by op, at the best")
        worst = self.verdict(results, "prefill: times transformers, op by op, at the worst")
        assert (best.value, best.is_met, worst.value, worst.is_met) == ("2.00", True, "0.90", False)

    def test_a_wrong_output_is_named(self) -> None:
        wrong = replace(figure("linear", layer="o"), error=math.inf, tolerance=1e-2)
        found = self.verdict(results_of(wrong), "outputs compared")
        assert (found.value, found.is_met, found.where) == ("1", False, "o")


def test_the_text_is_short_enough_to_be_the_end_of_a_log() -> None:
    """All that a full run can give, with figures as long as they get."""
    labels = {"rows": FULL.rows, "layer": FULL.layers, "format": FULL.formats}
    found = [replace(figure("limit", 1e-3, name="copy"), num_bytes=10**9)]
    for rows, layer, weight_format in product(*labels.values()):
        for arm in ("chosen", "gemv", "flat_gemm", "gemm", "cuBLAS"):
            place = {"rows": rows, "layer": layer, "format": weight_format, "arm": arm}
            found.append(replace(figure("linear", 1.234e-3, **place), num_bytes=10**9))
    for heads, (batch, context) in product(("alike", "grouped"), FULL.decode):
        for by in ("synchronized", "asynchronized", "lazy", "torch SDPA", "FlexAttention", "FlashInfer"):
            place = {"heads": heads, "batch": batch, "context": context, "by": by}
            found.append(replace(figure("decode attention", 1.234e-3, **place), num_bytes=10**9))
    for heads, (batch, context) in product(("alike", "grouped"), FULL.prefill):
        for by in ("synchronized", "asynchronized", "lazy", "library", "torch SDPA", "FlexAttention", "FlashInfer"):
            place = {"heads": heads, "batch": batch, "context": context, "by": by}
            found.append(replace(figure("prefill attention", 12.34e-3, **place), num_ops=10**12))
    for heads, (num_new, context) in product(("alike", "grouped"), FULL.chunks):
        for by in ("synchronized", "asynchronized", "lazy", "library", "torch SDPA", "FlexAttention", "FlashInfer"):
            place = {"heads": heads, "batch": 1, "context": f"{num_new} of {context}", "by": by}
            found.append(replace(figure("chunk attention", 12.34e-3, **place), num_ops=10**12))
    for by in ("headrace", "transformers eager", "transformers sdpa", "transformers compiled"):
        for weight_format in FULL.model_formats if by == "headrace" else FULL.model_formats[:1]:
            for batch, context in [(1, 512), (1, 3072), *((size, 16) for size in FULL.model_batches)]:
                place = {"by": by, "format": weight_format, "batch": batch, "context": context}
                found.append(replace(figure("decode", 12.34e-3, **place), num_bytes=10**9))
    text = report.text(results_of(*found))
    assert len(text) < 11_500
    assert max(map(len, text.splitlines())) < 160, "a line was cut"


def test_tables_mark_what_is_wrong() -> None:
    labels = {"format": "int8", "layer": "o", "rows": 1}
    results = results_of(
        replace(figure("limit", 1e-6, name="copy"), num_bytes=1000),
        replace(figure("linear", 2e-6, arm="gemv", **labels), num_bytes=1000, error=0.5, tolerance=1e-2),
        replace(figure("linear", 4e-6, arm="cuBLAS", **labels), num_bytes=2000),
    )
    assert "2.0 50% (2.00) WRONG" in report.markdown(results)
    assert "4.0 50%" in report.markdown(results)


def test_ideas_are_off_beside_all_of_them_and_alone_beside_none() -> None:
    """Each variant takes a millisecond longer than the one before it."""
    found = []
    for i, variant in enumerate(VARIANTS):
        labels = {"variant": variant.key, "label": variant.label, "baseline": variant.baseline.key}
        found += [figure("ablation", 1e-3 * (i + 1), **labels, batch=size, context=16) for size in (1, 4)]
    results = results_of(*found)
    table = report.markdown(results)
    assert "| all three on | 1.000 (1.000) | 1.000 (1.000) |" in table
    assert "| synchronized softmax | 2.000 (0.500) | 2.000 (0.500) |" in table
    alone = table.split("each idea alone")[1].splitlines()[4:]
    cells = ["8.000 (1.000)", "9.000 (0.889)", "10.000 (0.800)", "11.000 (0.727)"]
    labels = [variant.label for variant in VARIANTS if variant.is_alone]
    assert alone == [f"| {label} | {cell} | {cell} |" for label, cell in zip(labels, cells, strict=True)]
    assert "log-sum-exp" not in table.split("each idea alone")[0]


def test_kernels_and_what_is_marked_are_what_a_gpu_tests() -> None:
    kernels, marked = (({file.name for file in files}) for files in files_to_test(ROOT / "tests"))
    assert "test_triton_machine_ops.py" in kernels
    assert "test_sampler.py" in marked
    assert not kernels & marked
    assert Path(__file__).name not in kernels | marked


def test_of_tests_that_were_cut_off_the_log_tells() -> None:
    log = """
tests/test_a.py::test_b PASSED [  3%]
[gw0] [  6%] PASSED tests/test_a.py::test_c[1]
[gw1] [  9%] FAILED tests/test_a.py::test_d
tests/test_a.py::test_e SKIPPED (no GPU) [ 12%]
tests/test_a.py::test_f"""
    found = outcomes(log)
    assert (found["passed"], found["failed"], found["skipped"]) == (2, 1, 1)
    assert [failure["test"] for failure in found["failures"]] == ["tests/test_a.py::test_d"]
    assert outcomes("no module named pytest")["failures"][0]["message"] == "no module named pytest"


def test_a_checkpoint_is_written_once_and_in_full(tmp_path) -> None:
    context = Context(
        device=torch.device("cpu"), dtype=torch.bfloat16, scale=DRY, folder=tmp_path, deadline_s=time.time() + 60
    )
    folder = random_checkpoint(context)
    index = folder / "model.safetensors.index.json"
    size = json.loads(index.read_text())["metadata"]["total_size"]
    found = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    assert size < found < size + 2**14
    written = index.stat().st_mtime_ns
    assert random_checkpoint(context) == folder
    assert index.stat().st_mtime_ns == written


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--stages", "limits,speed"], "--stages has speed"), (["--minutes", "0"], "--minutes is 0.0")],
)
def test_bad_options_are_refused(arguments, message, capsys) -> None:
    with pytest.raises(SystemExit):
        main(arguments)
    assert message in capsys.readouterr().err


def test_what_python_lacks_is_named(tmp_path) -> None:
    """A Python that finds no package of the site."""
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} -S -I "$@"\n')
    python.chmod(0o755)
    command = [str(ROOT / "scripts" / "gpu_check.sh"), "--minutes", "0"]
    done = subprocess.run(
        command, env={**os.environ, "PYTHON": str(python)}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "has no torch triton numpy safetensors" in done.stderr


class TestTables:
    """Of docs/gpu.md, from what the commands wrote."""

    def test_resources_of_each_kernel_and_gpu(self) -> None:
        report = {"variant": "gemv", "target": "sm_90", "registers": 40, "shared_bytes": 1536, "stack_bytes": 0}
        table = resources(
            [
                report,
                report | {"target": "gfx942", "stack_bytes": 8},
                report | {"variant": "merge", "instructions_per_weight": 2.75},
                {"variant": "merge", "target": "gfx942", "error": "ValueError"},
            ]
        )
        assert table.splitlines()[0] == "| kernel | gfx942 | sm_90 |"
        assert table.splitlines()[2:] == [
            "| gemv | 40 / 1.5 KiB, 8 B on the stack | 40 / 1.5 KiB |",
            "| merge | does not compile | 40 / 1.5 KiB, 2.8 a weight |",
        ]

    def test_go_where_they_belong(self, tmp_path) -> None:
        page, measured = tmp_path / "gpu.md", tmp_path / "measured.md"
        kept = "before\n<!-- resources -->\nold\n<!-- /resources -->\n"
        page.write_text(f"{kept}<!-- measured -->\n<!-- /measured -->\n")
        measured.write_text("| fast |\n")
        assert write_tables(page, compiled=tmp_path / "none", measured=measured) == 0
        assert page.read_text() == f"{kept}<!-- measured -->\n\n| fast |\n\n<!-- /measured -->\n"

    def test_the_page_has_both_places(self) -> None:
        text = (ROOT / "docs" / "gpu.md").read_text()
        for name in ("resources", "measured"):
            assert f"<!-- {name} -->\n" in text
            assert f"<!-- /{name} -->" in text
