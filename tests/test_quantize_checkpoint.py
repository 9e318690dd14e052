"""Saving a quantized checkpoint: it loads again to the same model, and a failure leaves nothing behind."""

import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from headrace import LLM, SamplingParams, quantize
from headrace.demo_model import demo_model_path
from headrace.errors import CheckpointError, ConfigError
from headrace.models import quantize_checkpoint

PARAMS = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True, logprobs=0)
PROMPT = {"prompt_token_ids": list(range(20, 60))}


def tokens_and_logprobs(llm: LLM) -> tuple[list[int], list[float]]:
    completion = llm.generate(PROMPT, PARAMS)[0].outputs[0]
    assert completion.logprobs is not None
    return completion.token_ids, [next(iter(row.values())).logprob for row in completion.logprobs]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    shutil.copytree(demo_model_path(), folder, ignore=shutil.ignore_patterns("__pycache__", "*.py"))
    return folder


@pytest.mark.parametrize("weight_format", ["int8", "int4"])
def test_saved_checkpoint_is_what_quantizing_on_load_gives(tmp_path: Path, weight_format: str) -> None:
    saved = quantize(str(demo_model_path()), tmp_path / "q", weight_format)
    on_load = LLM(str(demo_model_path()), quantize=weight_format, dtype="float32", num_threads=1)
    from_disk = LLM(str(saved), dtype="float32", num_threads=1)
    assert tokens_and_logprobs(from_disk) == tokens_and_logprobs(on_load)
    assert from_disk.engine.model.weight_bytes == on_load.engine.model.weight_bytes
    assert from_disk.chat_prompt([{"role": "user", "content": "Hi"}])


def test_size_is_that_of_the_format(tmp_path: Path) -> None:
    sizes = {}
    for weight_format in ("int8", "int4"):
        folder = quantize(str(demo_model_path()), tmp_path / weight_format, weight_format)
        sizes[weight_format] = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    original = (demo_model_path() / "model.safetensors").stat().st_size
    # A float32 scale for 32 entries adds one bit to each: 9 and 5 bits instead of 16.
    assert sizes["int8"] / original == pytest.approx(9 / 16, rel=0.02)
    assert sizes["int4"] / original == pytest.approx(5 / 16, rel=0.02)


def test_many_shards_are_one_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = quantize(str(demo_model_path()), tmp_path / "whole", "int8")
    monkeypatch.setattr(quantize_checkpoint, "_SHARD_BYTES", 2**20)
    sharded = quantize(str(demo_model_path()), tmp_path / "sharded", "int8")
    assert len(list(sharded.glob("*.safetensors"))) > 2
    assert tokens_and_logprobs(LLM(str(sharded), num_threads=1)) == tokens_and_logprobs(LLM(str(whole), num_threads=1))


def test_existing_output_is_not_touched(tmp_path: Path) -> None:
    precious = tmp_path / "out" / "precious"
    precious.parent.mkdir()
    precious.write_text("keep")
    with pytest.raises(ConfigError, match="exists"):
        quantize(str(demo_model_path()), tmp_path / "out", "int4")
    assert precious.read_text() == "keep"


def test_quantized_source_is_refused(tmp_path: Path) -> None:
    once = quantize(str(demo_model_path()), tmp_path / "once", "int8")
    with pytest.raises(ConfigError, match="already quantized to int8"):
        quantize(str(once), tmp_path / "twice", "int4")
    with pytest.raises(ConfigError, match="already quantized to int8"):
        LLM(str(once), quantize="int4")


def test_weights_that_are_not_numbers_are_named(tmp_path: Path, source: Path) -> None:
    weights = load_file(source / "model.safetensors")
    weights["model.layers.1.mlp.down_proj.weight"][3, 5] = torch.inf
    save_file(weights, source / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"model\.layers\.1\.mlp\.down_proj\.weight.*NaN or infinity"):
        quantize(str(source), tmp_path / "q", "int4")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["source"]


def test_file_size_limit_leaves_nothing_behind(tmp_path: Path) -> None:
    """Any failed write counts, and this one can be had without a full disk."""

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))

    result = run_quantize(tmp_path / "q", preexec=limit)
    assert (result.returncode, list(tmp_path.iterdir())) == (2, [])
    assert_one_line(result.stderr, "cannot write")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("mounting a small tmpfs needs root")
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"no tmpfs here: {mounted.stderr.strip()}")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_full_disk_is_one_clear_line(small_disk: Path) -> None:
    result = run_quantize(small_disk / "q")
    assert (result.returncode, list(small_disk.iterdir())) == (2, [])
    assert_one_line(result.stderr, "bytes free there")


def run_quantize(output: Path, preexec: object = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "headrace", "quantize", "--model", str(demo_model_path())]
    return subprocess.run(
        [*command, "--quantize", "int8", "--output", str(output)],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        preexec_fn=preexec,  # type: ignore[arg-type]
    )


def assert_one_line(stderr: str, message: str) -> None:
    [line] = stderr.strip().splitlines()
    assert line.startswith("headrace: error: ")
    assert message in line
