"""Every mistake a user can make at the command line: one clear line, exit code 2, no traceback."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from headrace.cli.main import main
from headrace.demo_model import demo_model_path

Break = Callable[[Path], None]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A copy of the shipped model, to be broken."""
    folder = tmp_path / "model"
    shutil.copytree(demo_model_path(), folder, ignore=shutil.ignore_patterns("__pycache__", "*.py"))
    return folder


def error_line(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """Run a command that must fail; returns its one line."""
    assert main(argv) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    [line] = captured.err.strip().splitlines()
    assert line.startswith("headrace: error: ")
    assert "Traceback" not in line
    return line


def truncate(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def corrupt_header(folder: Path) -> None:
    file = folder / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[8:40] = b"\xff" * 32
    file.write_bytes(data)


def edit_weights(change: Callable[[dict[str, torch.Tensor]], None]) -> Break:
    def edit(folder: Path) -> None:
        weights = load_file(folder / "model.safetensors")
        change(weights)
        save_file(weights, folder / "model.safetensors")

    return edit


def reshape(weights: dict[str, torch.Tensor]) -> None:
    weights["model.layers.0.mlp.up_proj.weight"] = weights["model.layers.0.mlp.up_proj.weight"][:-8].clone()


def drop(weights: dict[str, torch.Tensor]) -> None:
    del weights["model.layers.1.self_attn.k_proj.weight"]


def add(weights: dict[str, torch.Tensor]) -> None:
    weights["model.layers.0.adapter.weight"] = torch.zeros(2, 2)


def edit_tokenizer(**changes: object) -> Break:
    return lambda folder: edit_json(folder / "tokenizer_config.json", changes)


def edit_config(**changes: object) -> Break:
    return lambda folder: edit_json(folder / "config.json", changes)


def edit_json(file: Path, changes: dict[str, object]) -> None:
    data = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in data.items() if value is not None}))


def write(name: str, data: bytes) -> Break:
    return lambda folder: (folder / name).write_bytes(data) and None


def remove(name: str) -> Break:
    return lambda folder: (folder / name).unlink()


def only_a_pickle(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'false'\ntR.")


BROKEN_MODELS: dict[str, tuple[Break, str]] = {
    "truncated": (truncate, "not a whole safetensors file"),
    "corrupt_header": (corrupt_header, "not a whole safetensors file"),
    "empty_weights": (write("model.safetensors", b""), "not a whole safetensors file"),
    "wrong_shape": (edit_weights(reshape), "wrong shape: model.layers.0.mlp.up_proj.weight ["),
    "missing_tensor": (edit_weights(drop), "lacks model.layers.1.self_attn.k_proj.weight"),
    "unexpected_tensor": (edit_weights(add), "does not use: model.layers.0.adapter.weight"),
    "only_a_pickle": (only_a_pickle, "pytorch_model.bin is a pickle, which can run code and is never read"),
    "unknown_architecture": (
        edit_config(architectures=["LlamaForCausalLN"]),
        "architecture 'LlamaForCausalLN' is not supported; did you mean 'LlamaForCausalLM'?",
    ),
    "no_architecture": (edit_config(architectures=None), "architectures; it must name exactly one"),
    "missing_key": (edit_config(hidden_size=None), "config.json has no 'hidden_size'"),
    "wrong_type": (edit_config(num_hidden_layers="four"), "num_hidden_layers is 'four'; it must be a number"),
    "uneven_heads": (edit_config(num_key_value_heads=3), "cannot share 3 KV heads evenly"),
    "unknown_rope": (
        edit_config(rope_parameters={"rope_type": "longrope", "factor": 2.0}),
        "rope type 'longrope' is not supported",
    ),
    "foreign_quantization": (
        edit_config(quantization_config={"quant_method": "gptq", "bits": 4}),
        "quantized by 'gptq'",
    ),
    "config_not_utf8": (write("config.json", b'{"a": "\xff\xfe"}'), "cannot be read as JSON"),
    "config_not_json": (write("config.json", b"hello"), "cannot be read as JSON"),
    "config_not_an_object": (write("config.json", b"[]"), "must hold a JSON object"),
    "no_config": (remove("config.json"), "has no config.json"),
    "no_weights": (remove("model.safetensors"), "has no safetensors files"),
    "eos_is_text": (edit_config(eos_token_id="abc"), "eos_token_id is 'abc'; it must be a token id"),
    "eos_is_negative": (edit_config(eos_token_id=-1), "eos_token_id is -1"),
    "eos_is_nested": (edit_config(eos_token_id=[[1]]), "eos_token_id is [[1]]"),
    "endless_integer": (write("config.json", b'{"hidden_size": ' + b"9" * 5000 + b"}"), "cannot be read as JSON"),
    "format_is_a_list": (
        edit_config(quantization_config={"quant_method": "headrace", "weight_format": ["int4"], "group_size": 32}),
        "allowed: weight_format int8 or int4",
    ),
    "template_not_utf8": (write("chat_template.jinja", b"\xff\xfe"), "cannot be read as UTF-8"),
    "template_too_deep": (write("chat_template.jinja", b"{{" + b"(" * 5000 + b"}}"), "chat template"),
    "added_tokens_is_a_list": (edit_tokenizer(added_tokens_decoder=[1]), "added_tokens_decoder is [1]"),
    "special_tokens_is_a_number": (edit_tokenizer(additional_special_tokens=5), "additional_special_tokens are 5"),
    "dynamic_rope_of_one_pair": (
        edit_config(head_dim=2, rope_parameters={"rope_type": "dynamic", "factor": 2.0}),
        "dynamic scaling needs at least 4",
    ),
    "no_tokenizer": (remove("tokenizer.json"), "no tokenizer.json and no tokenizer.model"),
    "broken_tokenizer": (write("tokenizer.json", b"{}"), "tokenizer.json"),
}


@pytest.mark.parametrize("name", BROKEN_MODELS)
def test_broken_model(name: str, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    break_it, message = BROKEN_MODELS[name]
    break_it(model)
    line = error_line(capsys, "generate", "Hello", "--model", str(model))
    assert message in line


BAD_CALLS: dict[str, tuple[list[str], str]] = {
    "missing_folder": (["generate", "Hi", "--model", "./no/such/folder"], "does not exist"),
    "empty_prompt": (["generate", ""], "empty"),
    "prompt_beyond_the_context": (["generate", "--raw", "word " * 3000], "max_model_len"),
    "budget_too_small": (["generate", "Hi", "--kv-cache-bytes", "100kB"], "or set --max-model-len to at most 48"),
    "transport_of_one_rank": (["generate", "Hi", "--transport", "mpi"], "transport is 'mpi', but one rank"),
    "context_too_long": (["generate", "Hi", "--max-model-len", "4096"], "positions reach 1024"),
    "negative_temperature": (["generate", "Hi", "--temperature", "-1"], "temperature"),
    "top_p_beyond_one": (["generate", "Hi", "--top-p", "1.5"], "top_p"),
    "misspelt_option": (["generate", "Hi", "--temprature", "1"], "--temperature"),
    "misspelt_command": (["genrate", "Hi"], "did you mean 'generate'"),
    "unknown_dtype": (["generate", "Hi", "--dtype", "float16"], "float32"),
    "unknown_format": (["generate", "Hi", "--quantize", "int5"], "int4"),
    "batch_below_sequences": (["generate", "Hi", "--max-num-batched-tokens", "8"], "max_num_seqs"),
    "endless_threads": (["generate", "Hi", "--threads", "100000000000"], "allowed: 1 to"),
    "more_cache_than_memory": (
        [
            "generate",
            "Hi",
            "--kv-cache-bytes",
            "900TB",
            "--max-num-seqs",
            "1000",
            "--max-num-batched-tokens",
            "1000",
            "--block-size",
            "1000000000",
        ],
        "are free",
    ),
    "token_outside_vocabulary": (["generate", "--prompt-token-ids", "5,99999"], "99999 is not in the vocabulary"),
    "missing_prompt_file": (["generate", "--prompt-file", "/no/such/file"], "/no/such/file"),
    "quantize_missing_folder": (
        ["quantize", "--model", "./no/such", "--quantize", "int4", "--output", "out"],
        "does not exist",
    ),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_call(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    argv, message = BAD_CALLS[name]
    assert message in error_line(capsys, *argv)
    assert list(tmp_path.iterdir()) == []


def test_a_budget_without_room_for_anything_is_told_what_is_needed_alone(capsys: pytest.CaptureFixture[str]) -> None:
    line = error_line(capsys, "generate", "Hi", "--kv-cache-bytes", "1")
    assert line.endswith("too few for one sequence of max_model_len 1024; give it 2097152 bytes (--kv-cache-bytes)")


def test_prompt_file_that_is_not_utf8(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "prompt.txt"
    file.write_bytes(b"caf\xe9")
    assert "UTF-8" in error_line(capsys, "generate", "--prompt-file", str(file))


def test_kernels_asked_for_by_name_run_or_fail(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    for value, message in {"triton": "Triton kernels need a GPU", "referense": "did you mean 'reference'"}.items():
        monkeypatch.setenv("HEADRACE_KERNELS", value)
        assert message in error_line(capsys, "generate", "Hi")


def test_pickle_is_never_loaded(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A pickle beside good weights that would create a file if anything unpickled it."""
    marker = tmp_path / "executed"
    payload = f"cbuiltins\neval\n(S'open({str(marker)!r}, \"w\")'\ntR.".encode()
    for name in ("pytorch_model.bin", "model.pt", "training_args.bin"):
        (model / name).write_bytes(payload)
    (model / "modeling_evil.py").write_text(f"open({str(marker)!r}, 'w')")
    edit_config(auto_map={"AutoModelForCausalLM": "modeling_evil.Evil"})(model)
    assert main(["generate", "Hi", "--model", str(model), "--max-tokens", "2"]) == 0
    assert not marker.exists()
