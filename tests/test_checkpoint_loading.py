"""What a model folder may do to the loader: load in any layout and dtype, within a bound of memory, or be refused."""

import gc
import json
import shutil
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch
from checkpoints import (
    BY_NAME,
    EACH_KERNELS,
    RECIPES,
    load,
    load_folder,
    prompt_logits,
    random_tokens,
    read_config,
    write_config,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from headrace.config import Dtype, LoadConfig, WeightFormat
from headrace.errors import CheckpointError, HeadraceError
from headrace.kernels import KernelChoice
from headrace.models.checkpoint import Checkpoint
from headrace.models.families import FAMILIES, read_model_config
from headrace.models.source import open_model, resolve_formats

PROMPT = random_tokens(20, seed=1)
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    BY_NAME["llama-biases"].write(folder)
    return folder


@pytest.fixture
def folder(llama, tmp_path) -> Path:
    """A copy of the checkpoint that a test may damage."""
    copy = tmp_path / "model"
    shutil.copytree(llama, copy)
    return copy


def edit_tensors(folder: Path, edit) -> None:
    tensors = load_file(folder / WEIGHTS)
    edit(tensors)
    save_file(tensors, folder / WEIGHTS)


def edit_config(folder: Path, **changes) -> None:
    write_config(folder, read_config(folder) | changes)


def split(folder: Path, num_files: int) -> None:
    """Spread the tensors of one file over several, in no order, with an index."""
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    weight_map = {name: f"model-{i % num_files}.safetensors" for i, name in enumerate(tensors)}
    for file in set(weight_map.values()):
        save_file({name: tensors[name] for name, at in weight_map.items() if at == file}, folder / file)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def loaded_logits(folder: Path, **how) -> Tensor:
    return prompt_logits(load_folder(folder, **how), PROMPT)


# Layouts


@pytest.mark.parametrize("num_files", [1, 3])
def test_sharded_equals_unsharded(llama, folder, num_files):
    split(folder, num_files)
    assert torch.equal(loaded_logits(folder), loaded_logits(llama))


def test_shards_without_an_index_load_too(llama, folder):
    split(folder, 2)
    (folder / INDEX).unlink()
    assert torch.equal(loaded_logits(folder), loaded_logits(llama))


def test_files_beside_the_index_are_not_read(llama, folder):
    split(folder, 2)
    save_file({"unrelated": torch.ones(2)}, folder / "consolidated.safetensors")
    assert torch.equal(loaded_logits(folder), loaded_logits(llama))


def test_index_cannot_reach_outside_its_folder(folder):
    split(folder, 2)
    index = json.loads((folder / INDEX).read_text())
    outside = folder.parent / "outside.safetensors"
    shutil.move(folder / "model-0.safetensors", outside)
    index["weight_map"] = {
        name: "../outside.safetensors" if file == "model-0.safetensors" else file
        for name, file in index["weight_map"].items()
    }
    (folder / INDEX).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"files that .* does not have: outside\.safetensors"):
        open_model(folder)


def test_index_naming_a_missing_file_is_refused(folder):
    split(folder, 3)
    (folder / "model-1.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"does not have: model-1\.safetensors"):
        open_model(folder)


@pytest.mark.parametrize("index", ["[]", "{}", '{"weight_map": {"a": 1}}', "not json"])
def test_malformed_index_is_refused(folder, index):
    (folder / INDEX).write_text(index)
    with pytest.raises(CheckpointError, match=r"index\.json"):
        open_model(folder)


def test_tensor_in_two_files_is_refused(folder):
    tensors = load_file(folder / WEIGHTS)
    save_file({"model.norm.weight": tensors["model.norm.weight"]}, folder / "again.safetensors")
    (folder / WEIGHTS).rename(folder / "first.safetensors")
    with pytest.raises(CheckpointError, match=r"'model\.norm\.weight' is in both"):
        open_model(folder)


# Damaged files


@pytest.mark.parametrize("keep", [0, 4, 100, -1], ids=["empty", "half-a-length", "half-a-header", "last-byte-gone"])
def test_truncated_file_is_refused(folder, keep):
    whole = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(whole[:keep])
    with pytest.raises(CheckpointError, match="is not a whole safetensors file"):
        open_model(folder)


@pytest.mark.parametrize(
    "head",
    [b"\xff" * 8, (2**40).to_bytes(8, "little"), (100).to_bytes(8, "little") + b"{" * 100],
    ids=["header-longer-than-memory", "header-longer-than-the-file", "header-not-json"],
)
def test_corrupt_header_is_refused(folder, head):
    whole = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(head + whole[len(head) :])
    with pytest.raises(CheckpointError, match="is not a whole safetensors file"):
        open_model(folder)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_damaged_byte_of_the_header_loads_or_is_refused(folder, data):
    original = (folder / WEIGHTS).read_bytes()
    header_bytes = 8 + int.from_bytes(original[:8], "little")
    at = data.draw(st.integers(0, header_bytes - 1))
    byte = data.draw(st.integers(0, 255))
    try:
        (folder / WEIGHTS).write_bytes(original[:at] + bytes([byte]) + original[at + 1 :])
        load_folder(folder)
    except CheckpointError:
        pass
    finally:
        (folder / WEIGHTS).write_bytes(original)


# Tensors that do not fit


def test_missing_tensors_are_named_with_the_architecture(folder):
    def edit(tensors):
        for name in [name for name in tensors if name.endswith("proj.weight")]:
            del tensors[name]

    edit_tensors(folder, edit)
    with pytest.raises(CheckpointError) as caught:
        load_folder(folder)
    message = str(caught.value)
    assert message.startswith("LlamaForCausalLM checkpoint")
    assert "lacks" in message
    assert message.count("proj.weight") == 5
    assert message.endswith("and 9 more")


def test_unexpected_tensors_are_named_with_the_architecture(folder):
    edit_tensors(folder, lambda tensors: tensors.update({f"visual.{i}.weight": torch.ones(2) for i in range(7)}))
    with pytest.raises(CheckpointError) as caught:
        load_folder(folder)
    message = str(caught.value)
    assert message.startswith("LlamaForCausalLM checkpoint")
    assert "does not use: visual.0.weight, visual.1.weight" in message
    assert message.count("visual") == 5
    assert message.endswith("and 2 more")


@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "model.norm.weight", "lm_head.weight"])
def test_wrong_shape_is_refused_and_both_shapes_named(folder, name):
    edit_tensors(folder, lambda tensors: tensors.update({name: tensors[name][:-1].contiguous()}))
    with pytest.raises(CheckpointError, match=rf"wrong shape: {name} \[\d+(, 64)?\] instead of \[\d+(, 64)?\]"):
        load_folder(folder)


def test_transposed_matrix_is_refused(folder):
    name = "model.layers.0.mlp.down_proj.weight"
    edit_tensors(folder, lambda tensors: tensors.update({name: tensors[name].T.contiguous()}))
    with pytest.raises(CheckpointError, match=rf"{name} \[96, 64\] instead of \[64, 96\]"):
        load_folder(folder)


def test_rotary_frequencies_of_old_checkpoints_are_ignored(llama, folder):
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    edit_tensors(folder, lambda tensors: tensors.update({name: torch.full((8,), 7.0)}))
    assert torch.equal(loaded_logits(folder), loaded_logits(llama))


def test_tied_head_stored_twice_is_accepted(tmp_path):
    BY_NAME["llama-tied"].write(tmp_path)
    once = loaded_logits(tmp_path)
    edit_tensors(tmp_path, lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"] + 0}))
    assert torch.equal(loaded_logits(tmp_path), once)


@pytest.mark.parametrize("name", ["opt", "chatglm3", "glm", "gemma2", "mixtral", "qwen3-moe"])
def test_missing_tensor_is_named_as_the_checkpoint_names_it(tmp_path, name):
    BY_NAME[name].write(tmp_path)
    gone = sorted(load_file(tmp_path / WEIGHTS))[5]
    edit_tensors(tmp_path, lambda tensors: tensors.pop(gone))
    with pytest.raises(CheckpointError, match=f"lacks {gone}"):
        load_folder(tmp_path)


# config.json


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "has no config.json"),
        (b"{", "cannot be read as JSON"),
        (b"\xff\xfe{}", "cannot be read as JSON"),
        (b"[" * 100_000, "cannot be read as JSON"),
        (b"[1]", "holds a list; it must hold a JSON object"),
        (b"null", "holds a NoneType"),
        (b"{}", "names None as architectures"),
        (b'{"architectures": []}', "exactly one"),
        (b'{"architectures": ["LlamaForCausalLM"]}', "config.json has no '"),
    ],
    ids=["missing", "cut-off", "not-utf8", "nested-too-deep", "list", "null", "empty", "no-architecture", "no-sizes"],
)
def test_unreadable_config_is_refused(folder, content, message):
    (folder / "config.json").unlink()
    if content is not None:
        (folder / "config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        open_model(folder)


@pytest.mark.parametrize(
    ("architecture", "hint"),
    [
        ("LlamaForCausualLM", "did you mean 'LlamaForCausalLM'"),
        ("Qwen3MoEForCausalLM", "did you mean 'Qwen3MoeForCausalLM'"),
        ("FalconForCausalLM", "known: ChatGLMForConditionalGeneration, ChatGLMModel, "),
        ("Zzz", "known: ChatGLMForConditionalGeneration, ChatGLMModel, "),
    ],
)
def test_unknown_architecture_suggests_a_known_one(folder, architecture, hint):
    edit_config(folder, architectures=[architecture])
    with pytest.raises(CheckpointError, match=f"'{architecture}' is not supported; {hint}"):
        open_model(folder)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("hidden_size", "64"),
        ("hidden_size", 0),
        ("hidden_size", -64),
        ("hidden_size", True),
        ("hidden_size", 63),
        ("num_attention_heads", 0),
        ("num_attention_heads", 3),
        ("num_hidden_layers", 0),
        ("rms_norm_eps", "small"),
        ("rms_norm_eps", float("nan")),
        ("attention_bias", "yes"),
        ("hidden_act", "swishy"),
        ("hidden_act", ["silu"]),
        ("rope_parameters", [1]),
        ("rope_parameters", {"rope_type": "spiral"}),
        ("rope_parameters", {"rope_type": ["linear"]}),
        ("rope_parameters", {"rope_theta": "1e4"}),
        ("rope_parameters", {"rope_type": "linear", "factor": 0}),
        ("rope_parameters", {"rope_type": "linear", "factor": "2"}),
        ("rope_parameters", {"rope_type": "llama3", "factor": 2.0, "low_freq_factor": 4.0, "high_freq_factor": 4.0}),
        ("rope_parameters", {"rope_type": "yarn", "factor": 2.0, "truncate": 1}),
        ("architectures", "LlamaForCausalLM"),
    ],
    ids=str,
)
def test_wrong_value_in_config_is_refused_by_name(folder, key, value):
    edit_config(folder, **{"head_dim": None, key: value})
    with pytest.raises(CheckpointError, match=r"config\.json"):
        open_model(folder)


WRONG = (None, True, "x", "", -1, 0, 1, 1.5, float("nan"), float("inf"), 10**400, [], [None], ["x"], {}, {"a": 1})


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)
def test_no_wrong_value_in_config_ends_in_another_error(recipe, tmp_path):
    """Bugs: zero heads ended in ZeroDivisionError, a list as activation or rope type in TypeError, a string as theta
    in ValueError; each must be one line that names the file."""
    recipe.write(tmp_path)
    config = read_config(tmp_path)
    for target in (config, *_nested_objects(config)):
        for key in target.keys() - {"architectures"}:
            for wrong in WRONG:
                kept, target[key] = target[key], wrong
                _read_or_refuse(config, f"{key}={wrong!r}")
                target[key] = kept


def _nested_objects(config: dict) -> list[dict]:
    rope = config.get("rope_parameters") or {}
    return [rope, *(value for value in rope.values() if isinstance(value, dict))]


def _read_or_refuse(config: dict, what: str) -> None:
    try:
        read_model_config(config)
    except HeadraceError:
        pass
    except Exception as error:
        pytest.fail(f"{what} ended in {type(error).__name__}: {error}")


def test_mistral_without_a_window_in_its_config_has_the_default_one(tmp_path):
    """Bug: an absent sliding_window meant none; transformers means 4096 by it, and none by null."""
    BY_NAME["mistral-window"].write(tmp_path)
    config = read_config(tmp_path)
    del config["sliding_window"]
    assert read_model_config(config)[1].layers[0].sliding_window == 4096
    assert read_model_config(config | {"sliding_window": None})[1].layers[0].sliding_window is None


@pytest.mark.parametrize(
    "published",
    [
        {"original_rope": False},
        {"multi_query_attention": False},
        {"apply_residual_connection_post_layernorm": True},
        {"pre_seq_len": 128},
        {"quantization_bit": 4},
        {"padded_vocab_size": None},
    ],
    ids=lambda published: next(iter(published)),
)
def test_chatglm_settings_no_text_model_was_published_with_are_refused(tmp_path, published):
    """Bug: multi_query_attention false was read as if q, k and v were stacked; they lie mixed, head by head."""
    BY_NAME["chatglm3"].write(tmp_path)
    with pytest.raises(CheckpointError, match=next(iter(published))):
        read_model_config(read_config(tmp_path) | published)


# What is never read


@pytest.mark.parametrize("pickle", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_pickles_are_refused_with_a_hint(folder, pickle):
    (folder / WEIGHTS).rename(folder / pickle)
    with pytest.raises(CheckpointError, match=f"no safetensors files; {pickle} is a pickle.*never read: convert"):
        open_model(folder)


@pytest.mark.parametrize("method", ["gptq", "awq", "bitsandbytes", "fp8"])
def test_foreign_quantization_is_refused_by_name(folder, method):
    edit_config(folder, quantization_config={"quant_method": method, "bits": 4})
    with pytest.raises(CheckpointError, match=f"quantized by '{method}'"):
        open_model(folder)


# Dtypes


def test_float16_checkpoint_loads_as_bfloat16_and_as_float32(folder):
    expected = loaded_logits(folder)
    edit_tensors(folder, lambda tensors: tensors.update({name: t.half() for name, t in tensors.items()}))
    edit_config(folder, dtype="float16")
    source = open_model(folder)
    assert resolve_formats(source, LoadConfig(model="", dtype=Dtype.AUTO)).dense is WeightFormat.BFLOAT16
    as_float32 = prompt_logits(load(source, dtype=Dtype.FLOAT32), PROMPT)
    as_bfloat16 = prompt_logits(load(source, dtype=Dtype.AUTO), PROMPT, dtype=torch.bfloat16)
    assert (as_float32 - expected).abs().max() < 0.05
    assert (as_bfloat16 - expected).abs().mean() < 0.1 * expected.std()


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        (torch.float32, WeightFormat.FLOAT32),
        (torch.float16, WeightFormat.BFLOAT16),
        (torch.bfloat16, WeightFormat.BFLOAT16),
        (torch.float64, WeightFormat.FLOAT32),
    ],
    ids=str,
)
def test_dtype_of_a_config_that_names_none_is_that_of_the_tensors(folder, dtype, expected):
    edit_tensors(folder, lambda tensors: tensors.update({name: t.to(dtype) for name, t in tensors.items()}))
    edit_config(folder, dtype=None)
    source = open_model(folder)
    assert resolve_formats(source, LoadConfig(model="")).dense is expected
    assert torch.isfinite(prompt_logits(load(source), PROMPT)).all()


def test_every_family_refuses_an_empty_config():
    for family in FAMILIES:
        with pytest.raises(CheckpointError, match=r"config\.json has no '"):
            read_model_config({"architectures": [family.architecture]})


def test_progress_counts_every_byte_of_the_checkpoint_once(llama):
    source = open_model(llama)
    seen = []
    load(source, progress=seen.append)
    assert sum(seen) == source.checkpoint_bytes


def test_rows_read_are_views_and_pages_can_be_released_while_they_live(llama):
    checkpoint = Checkpoint(llama)
    rows = checkpoint.read_rows("lm_head.weight", 3, 9)
    expected = load_file(llama / WEIGHTS)["lm_head.weight"][3:9]
    assert torch.equal(rows, expected)
    checkpoint.release("lm_head.weight")
    assert torch.equal(rows, expected)
    assert checkpoint.read_rows("lm_head.weight", 5, 5).shape == (0, 64)


# Memory


def test_file_larger_than_memory_is_read(tmp_path):
    """Bug: the map reserved memory for copies of its pages, so the system refused a file larger than its memory."""
    num_rows = (psutil.virtual_memory().total + psutil.swap_memory().total) // 2**20 + 1024
    header = {"big": {"dtype": "U8", "shape": [num_rows, 2**20], "data_offsets": [0, num_rows * 2**20]}}
    encoded = json.dumps(header).encode()
    with (tmp_path / WEIGHTS).open("wb") as stream:
        stream.write(len(encoded).to_bytes(8, "little") + encoded)
        try:
            stream.truncate(8 + len(encoded) + num_rows * 2**20)  # a hole: takes no disk
        except OSError as error:
            pytest.skip(f"no sparse file of this size here: {error}")
        stream.seek(-1, 2)
        stream.write(b"\x07")
    checkpoint = Checkpoint(tmp_path)
    assert checkpoint.read_rows("big", num_rows - 1, num_rows)[0, -3:].tolist() == [0, 0, 7]
    checkpoint.release("big")


HIDDEN, INTERMEDIATE, VOCAB, NUM_LAYERS = 2048, 5632, 8192, 2


def write_large(folder: Path) -> None:
    """270 MB of bfloat16 in one file per layer and one for the rest."""
    config = {
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": NUM_LAYERS,
        "num_attention_heads": 16,
        "torch_dtype": "bfloat16",
    }
    write_config(folder, config)
    noise = (torch.randn(VOCAB * HIDDEN) * 0.02).to(torch.bfloat16)

    def matrix(rows: int, columns: int) -> Tensor:
        return noise[: rows * columns].view(rows, columns).clone()

    ends = {"model.embed_tokens": matrix(VOCAB, HIDDEN), "lm_head": matrix(VOCAB, HIDDEN), "model.norm": noise[:HIDDEN]}
    weight_map = save_shard(ends, folder / "ends.safetensors")
    for i in range(NUM_LAYERS):
        prefix = f"model.layers.{i}"
        layer = {f"{prefix}.self_attn.{p}_proj": matrix(HIDDEN, HIDDEN) for p in "qkvo"}
        layer |= {f"{prefix}.mlp.{p}_proj": matrix(INTERMEDIATE, HIDDEN) for p in ("gate", "up")}
        layer |= {f"{prefix}.mlp.down_proj": matrix(HIDDEN, INTERMEDIATE)}
        layer |= {f"{prefix}.{n}_layernorm": noise[:HIDDEN] for n in ("input", "post_attention")}
        weight_map |= save_shard(layer, folder / f"layer-{i}.safetensors")
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))


def save_shard(tensors: dict[str, Tensor], file: Path) -> dict[str, str]:
    save_file({f"{name}.weight": tensor.clone() for name, tensor in tensors.items()}, file)
    return {f"{name}.weight": file.name for name in tensors}


MEASURE = """
import json, sys
from pathlib import Path
import torch
from checkpoints import load_folder
from headrace.config import Dtype, Quantize
from headrace.kernels import KernelChoice
from headrace.machine import peak_memory_bytes, reset_peak_memory

torch.set_num_threads(1)
small, large, dtype, quantize, kernels = sys.argv[1:]
how = {"dtype": Dtype(dtype), "quantize": Quantize(quantize), "kernels": KernelChoice(kernels)}
load_folder(Path(small), **how)  # pages of code count as resident once they have run
can_reset = reset_peak_memory()
before = peak_memory_bytes()
decoder = load_folder(Path(large), **how)
grown = peak_memory_bytes() - before
weights = sum(parameter.num_bytes for parameter in decoder.parameters())
print(json.dumps({"can_reset": can_reset, "grown": grown, "weights": weights}))
"""


def _row_scale_bytes() -> int:
    return 4 * (VOCAB + NUM_LAYERS * (4 * HIDDEN + 2 * INTERMEDIATE + HIDDEN))


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    folder = tmp_path_factory.mktemp("large")
    write_large(folder)
    gc.collect()
    yield folder
    shutil.rmtree(folder)


@pytest.mark.parametrize(
    ("dtype", "quantize", "bytes_per_weight"),
    [
        ("bfloat16", "none", 2.0),
        ("float32", "none", 4.0),
        ("bfloat16", "int8", 1.125),
        ("bfloat16", "int4", 0.625),
    ],
    ids=["bfloat16", "float32", "int8", "int4"],
)
@EACH_KERNELS
def test_loading_takes_little_more_memory_than_the_weights(llama, large, dtype, quantize, bytes_per_weight, kernels):
    """Bug: blocks of 8 MiB made the quantizer's temporaries 80 MB, half as large as the model they quantized."""
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(llama), str(large), dtype, quantize, kernels.value],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=True,
    )
    measured = json.loads(done.stdout)
    if not measured["can_reset"]:
        pytest.skip("the kernel does not let a process reset its peak memory")
    num_linear = VOCAB * HIDDEN + NUM_LAYERS * (4 * HIDDEN * HIDDEN + 3 * HIDDEN * INTERMEDIATE)
    if kernels is KernelChoice.CPU and quantize != "none":
        # Scales in a byte instead of float32, and one float32 for each row.
        bytes_per_weight += 1 / 32 - 4 / 32 + _row_scale_bytes() / num_linear
    expected = num_linear * bytes_per_weight + VOCAB * HIDDEN * (4 if dtype == "float32" else 2)
    ratio = measured["grown"] / measured["weights"]
    megabytes = measured["weights"] / 1e6
    print(f"{dtype} {quantize} {kernels.value}: {megabytes:.0f} MB of weights, peak growth {ratio:.3f} of that")
    assert measured["weights"] == pytest.approx(expected, rel=0.001)
    assert ratio < 1.2
