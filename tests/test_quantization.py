"""int8 and int4 weights: what rounding may cost, models that run on them, and which kernels run."""

import math
import shutil
from dataclasses import replace
from functools import partial
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints import (
    BY_NAME,
    EACH_KERNELS,
    HAS_NATIVE,
    Recipe,
    load,
    load_folder,
    prompt_logits,
    random_tokens,
    read_config,
    write_config,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from plain_quantizer import pack, plain_dequantize, plain_quantize
from safetensors.torch import load_file, save_file
from torch import Tensor

from headrace import LLM, SamplingParams
from headrace.config import Dtype, LoadConfig, Quantize, WeightFormat
from headrace.errors import BackendUnavailable, CheckpointError, ConfigError, KernelError
from headrace.kernels import (
    QUANTIZATION_GROUP_SIZE,
    KernelChoice,
    QuantizedWeight,
    Weight,
    dispatch,
    kernel_choice_from,
    reference,
    resolve_kernels,
)
from headrace.models.quantization import quantization_config
from headrace.models.source import open_model, resolve_formats

PROMPT = random_tokens(30, seed=7)
REFERENCE = KernelChoice.REFERENCE
QUANTIZED = (WeightFormat.INT8, WeightFormat.INT4)
FORMATS = pytest.mark.parametrize("weight_format", QUANTIZED, ids=lambda f: f.value)
TINY = float(np.finfo(np.float32).tiny)


# Rounding


def round_trip(rows: Tensor, weight_format: WeightFormat) -> tuple[np.ndarray, np.ndarray]:
    """The dequantized rows and each entry's scale."""
    qweight, scales = reference.quantize_rows(rows, weight_format)
    weight = QuantizedWeight(weight_format=weight_format, qweight=qweight, scales=scales, in_features=rows.shape[1])
    per_entry = np.repeat(scales.double().numpy(), QUANTIZATION_GROUP_SIZE, axis=1)[:, : rows.shape[1]]
    return reference.dequantize(weight).double().numpy(), per_entry


def assert_error_within_bound(rows: Tensor, weight_format: WeightFormat) -> None:
    """|w - dequantized| <= |scale| / 2.

    But for int4 entries above 7 steps, which are cut to 7: at most one and a half, for the mirror image of the largest
    entry where the scale was rounded down. And but for groups too small for a normal scale, which become zero.
    """
    w = rows.double().numpy()
    dequantized, scales = round_trip(rows, weight_format)
    assert np.isfinite(dequantized).all()
    steps = np.divide(w, scales, out=np.zeros_like(w), where=scales != 0)
    allowed = np.full_like(w, 0.5)
    if weight_format is WeightFormat.INT4:
        allowed = np.maximum(allowed, steps - 7)
        assert steps.max(initial=0) <= 8.5
    allowed = np.where(scales == 0, 127 * TINY, allowed * np.abs(scales) * (1 + 1e-5) + 1e-44)
    assert (np.abs(w - dequantized) <= allowed).all()


VALUES = st.one_of(
    st.floats(-1, 1, width=32),
    st.floats(-(2.0**127), 2.0**127, width=32),
    st.sampled_from([0.0, -0.0, 1e-45, -1e-45, 1e-38, 1e-36, 1.5e-36, TINY, 3e38, -3e38, 7.5, 8.0, -8.0]),
)


@FORMATS
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_error_of_any_rows_is_within_the_bound(weight_format, data):
    columns = data.draw(st.integers(1, 70))
    rows = data.draw(st.lists(st.lists(VALUES, min_size=columns, max_size=columns), min_size=1, max_size=3))
    assert_error_within_bound(torch.tensor(rows, dtype=torch.float32), weight_format)


@FORMATS
@pytest.mark.parametrize("columns", [1, 2, 31, 32, 33, 64, 95, 1000])
@pytest.mark.parametrize("spread", [1e-38, 1e-3, 1.0, 1e30])
def test_error_of_normal_rows_is_within_the_bound(weight_format, columns, spread):
    assert_error_within_bound(torch.randn(4, columns) * spread, weight_format)


@FORMATS
def test_zeros_stay_zero(weight_format):
    dequantized, scales = round_trip(torch.zeros(3, 40), weight_format)
    assert not dequantized.any()
    assert not scales.any()


@FORMATS
def test_scales_are_as_near_to_the_least_as_four_bits_come(weight_format):
    """int8: at most an eighth above it. int4: within a sixteenth of it, and so that the largest entry lands on -8."""
    rows = torch.randn(50, 96)
    dequantized, scales = round_trip(rows, weight_format)
    least = np.abs(rows.double().numpy().reshape(50, 3, 32)).max(-1) / (
        8 if weight_format is WeightFormat.INT4 else 127
    )
    scales = scales.reshape(50, 3, 32)[..., 0]
    assert np.array_equal(np.frexp(scales)[0] * 16 % 1, np.zeros_like(scales))
    if weight_format is WeightFormat.INT8:
        assert ((scales >= least * (1 - 1e-6)) & (scales <= least * 1.125)).all()
    else:
        assert (np.abs(np.abs(scales) / least - 1) <= 1 / 16 + 1e-6).all()
        assert np.array_equal((dequantized.reshape(50, 3, 32) / scales[..., None]).min(-1), np.full((50, 3), -8.0))


def test_int4_cuts_the_mirror_image_of_the_largest_entry_by_one_step():
    dequantized, scales = round_trip(torch.tensor([[8.0, -8.0, 7.4, -7.4]]), WeightFormat.INT4)
    assert scales[0, 0] == -1.0
    assert dequantized.tolist() == [[8.0, -7.0, 7.0, -7.0]]


def test_int4_scale_between_two_of_four_bits_goes_to_the_larger():
    assert round_trip(torch.tensor([[-8.5]]), WeightFormat.INT4)[1] == 1.125
    assert round_trip(torch.tensor([[np.nextafter(np.float32(-8.5), np.float32(0))]]), WeightFormat.INT4)[1] == 1.0


@FORMATS
def test_rows_are_quantized_independently(weight_format):
    rows = torch.randn(6, 50)
    whole, _ = round_trip(rows, weight_format)
    for i in range(6):
        assert np.array_equal(round_trip(rows[i : i + 1], weight_format)[0], whole[i : i + 1])


@FORMATS
def test_bfloat16_rows_are_quantized_as_their_float32_values(weight_format):
    rows = torch.randn(3, 50).to(torch.bfloat16)
    assert np.array_equal(round_trip(rows, weight_format)[0], round_trip(rows.float(), weight_format)[0])


@FORMATS
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")], ids=str)
def test_weight_that_is_not_finite_is_refused(weight_format, bad):
    rows = torch.randn(3, 50)
    rows[2, 49] = bad
    with pytest.raises(KernelError, match="NaN or infinity"):
        reference.quantize_rows(rows, weight_format)


# Models


def with_sizes(recipe: Recipe, **sizes) -> Recipe:
    return replace(recipe, settings=recipe.settings | sizes)


LLAMA = BY_NAME["llama-gqa"]
MODELS = {
    "k-64": LLAMA,
    "k-60": with_sizes(LLAMA, hidden_size=60, intermediate_size=90, head_dim=16),
    "k-20": with_sizes(LLAMA, hidden_size=20, intermediate_size=33, head_dim=6),
    "tied": BY_NAME["llama-tied"],
    "biases": BY_NAME["llama-biases"],
    "opt": BY_NAME["opt"],
    "chatglm": BY_NAME["chatglm3"],
    "glm": BY_NAME["glm"],
    "qwen3-moe": BY_NAME["qwen3-moe"],
}
ALL_MODELS = pytest.mark.parametrize("name", MODELS)


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> dict[str, Path]:
    folders = {name: tmp_path_factory.mktemp(name) for name in MODELS}
    for name, folder in folders.items():
        MODELS[name].write(folder)
    return folders


def is_quantized(name: str, tensor: Tensor, is_tied: bool) -> bool:
    """Every linear layer's matrix, and the embedding table where it is the head as well."""
    if tensor.ndim != 2 or name.endswith((".gate.weight", "embed_positions.weight")):
        return False
    if "embed_tokens" in name or "word_embeddings" in name:
        return is_tied
    return True


def quantizable(folder: Path) -> list[str]:
    is_tied = read_config(folder).get("tie_word_embeddings", False)
    return [name for name, t in load_file(folder / "model.safetensors").items() if is_quantized(name, t, is_tied)]


def round_weights(folder: Path, weight_format: WeightFormat) -> None:
    """Put the values that quantized weights stand for into the checkpoint itself."""
    tensors = load_file(folder / "model.safetensors")
    for name in quantizable(folder):
        rounded = plain_dequantize(*plain_quantize(tensors[name].numpy(), weight_format))
        tensors[name] = torch.from_numpy(rounded).float()
    save_file(tensors, folder / "model.safetensors")


@FORMATS
@ALL_MODELS
def test_model_quantized_on_load_equals_one_whose_weights_were_rounded(written, tmp_path, name, weight_format):
    rounded = shutil.copytree(written[name], tmp_path / "rounded")
    round_weights(rounded, weight_format)
    actual = prompt_logits(
        load_folder(written[name], quantize=Quantize(weight_format.value), kernels=REFERENCE), PROMPT
    )
    assert (actual - prompt_logits(load_folder(rounded, kernels=REFERENCE), PROMPT)).abs().max() < 1e-4


def by_definition(
    x: Tensor, weight: Weight, bias: Tensor | None = None, *, out_dtype: torch.dtype | None = None
) -> Tensor:
    """A linear layer as the native kernels define it, in float32."""
    assert out_dtype in (None, torch.float32)
    if isinstance(weight, QuantizedWeight):
        return reference.linear_int8_activations(x, weight, bias)
    return reference.linear(x, weight, bias)


def distance(actual: Tensor, expected: Tensor) -> Tensor:
    return (actual - expected).abs().mean(dim=-1).median()


@pytest.mark.skipif(not HAS_NATIVE, reason="the native module is not built")
@FORMATS
@ALL_MODELS
def test_native_model_computes_what_its_definition_says(written, name, weight_format):
    """Sums in another order may turn the rounding of an activation: near the definition, not equal.

    The yardstick is what rounding activations costs: native logits lie nearer to the definition's than those lie to the
    logits of unrounded activations. Where there are tiles that take float16, which rounds less than bytes do, logits
    lie nearer to those of unrounded activations by far. So for the middle one of the tokens: some may go to another
    expert.
    """
    how = {"quantize": Quantize(weight_format.value)}
    mixture = partial(reference.mixture, linear=by_definition)
    defined = replace(resolve_kernels(REFERENCE), linear=by_definition, mixture=mixture)
    expected = prompt_logits(load_folder(written[name], kernels=defined, **how), PROMPT)
    unrounded = prompt_logits(load_folder(written[name], kernels=REFERENCE, **how), PROMPT)
    price = distance(unrounded, expected)
    cpu = import_module("headrace.kernels.cpu")
    for target in {cpu.best_target(), [t for t in cpu.supported_targets() if not cpu.has_float16_tiles(t)][-1]}:
        kernels = resolve_kernels(KernelChoice.CPU, instruction_set=target)
        actual = prompt_logits(load_folder(written[name], kernels=kernels, **how), PROMPT)
        if cpu.has_float16_tiles(target):
            assert distance(actual, unrounded) < price / 4
        else:
            assert distance(actual, expected) < price


@EACH_KERNELS
@pytest.mark.parametrize(("quantize", "largest"), [("int8", 0.05), ("int4", 0.6)])
@pytest.mark.parametrize("name", ["k-64", "k-60", "k-20", "tied"])
def test_logits_of_a_quantized_model_stay_near_those_of_float32(written, name, quantize, largest, kernels):
    """Mean distance over the logits' spread; these random models are as sensitive as a model can be.

    Native kernels round activations to int8 as well. That error is independent of an int8 weight's and at most twice as
    large, since a scale that is a power of two is; together they are at most sqrt(1 + 4) times one. Beside an int4
    weight's, 16 times as large, it does not count.
    """
    if kernels is KernelChoice.CPU and quantize == "int8":
        largest *= math.sqrt(5)
    expected = prompt_logits(load_folder(written[name], kernels=kernels), PROMPT)
    actual = prompt_logits(load_folder(written[name], quantize=Quantize(quantize), kernels=kernels), PROMPT)
    assert (actual - expected).abs().mean() < largest * expected.std()


@pytest.mark.parametrize("quantize", ["int8", "int4"])
@pytest.mark.parametrize("name", ["k-64", "k-60", "tied"])
def test_engine_runs_on_quantized_weights(written, name, quantize):
    """Greedy tokens of the engine follow the logits of a whole prefill over the same weights."""
    llm = LLM(model=str(written[name]), dtype="float32", quantize=quantize, num_threads=1, block_size=8)
    params = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
    (output,) = llm.generate({"prompt_token_ids": PROMPT}, params)
    tokens = output.outputs[0].token_ids
    logits = prompt_logits(load_folder(written[name], quantize=Quantize(quantize)), PROMPT + tokens)
    assert logits[len(PROMPT) - 1 : -1].argmax(-1).tolist() == tokens


@EACH_KERNELS
@FORMATS
def test_quantized_weights_take_the_bytes_of_their_format(written, weight_format, kernels):
    """Scales are float32, or a byte and a float32 for each row."""
    decoder = load_folder(written["k-64"], quantize=Quantize(weight_format.value), kernels=kernels)
    weight = decoder.layers[0].mlp.down.weight
    scale_bytes, row_bytes = (4, 0) if kernels is REFERENCE else (1, 4)
    per_entry = (1 if weight_format is WeightFormat.INT8 else 0.5) + scale_bytes / QUANTIZATION_GROUP_SIZE
    assert weight.num_bytes == 64 * (96 * per_entry + row_bytes)


@FORMATS
@pytest.mark.parametrize("bad", [float("nan"), float("inf")], ids=str)
def test_checkpoint_with_a_weight_that_is_not_finite_is_refused_by_name(written, tmp_path, weight_format, bad):
    folder = shutil.copytree(written["k-64"], tmp_path / "bad")
    name = "model.layers.1.mlp.down_proj.weight"
    tensors = load_file(folder / "model.safetensors")
    tensors[name][3, 5] = bad
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=f"tensor '{name}': cannot quantize a weight that holds NaN or infinity"):
        load_folder(folder, quantize=Quantize(weight_format.value))


# Checkpoints that are stored quantized


def store_quantized(folder: Path, weight_format: WeightFormat) -> None:
    tensors = load_file(folder / "model.safetensors")
    for name in quantizable(folder):
        q, scales = plain_quantize(tensors.pop(name).numpy(), weight_format)
        stem = name.removesuffix(".weight")
        tensors |= {f"{stem}.qweight": torch.from_numpy(pack(q, weight_format)), f"{stem}.scales": torch.tensor(scales)}
    save_file(tensors, folder / "model.safetensors")
    write_config(folder, read_config(folder) | {"quantization_config": quantization_config(weight_format)})


@EACH_KERNELS
@FORMATS
@ALL_MODELS
def test_stored_quantized_equals_quantized_on_load(written, tmp_path, name, weight_format, kernels):
    stored = shutil.copytree(written[name], tmp_path / "stored")
    store_quantized(stored, weight_format)
    on_load = prompt_logits(load_folder(written[name], quantize=Quantize(weight_format.value), kernels=kernels), PROMPT)
    assert torch.equal(prompt_logits(load_folder(stored, kernels=kernels), PROMPT), on_load)


def test_stored_quantized_cannot_be_loaded_as_another_format(written, tmp_path):
    stored = shutil.copytree(written["k-64"], tmp_path / "stored")
    store_quantized(stored, WeightFormat.INT8)
    source = open_model(stored)
    for asked in (Quantize.NONE, Quantize.INT8):
        assert resolve_formats(source, LoadConfig(model="", quantize=asked)).linear is WeightFormat.INT8
    with pytest.raises(ConfigError, match="already quantized to int8; it cannot be loaded as int4"):
        load(source, quantize=Quantize.INT4)


@pytest.mark.parametrize("changes", [{"group_size": 64}, {"weight_format": "int3"}, {"weight_format": None}], ids=str)
def test_stored_quantized_in_a_form_of_another_version_is_refused(written, tmp_path, changes):
    stored = shutil.copytree(written["k-64"], tmp_path / "stored")
    entry = quantization_config(WeightFormat.INT8) | changes
    write_config(stored, read_config(stored) | {"quantization_config": entry})
    with pytest.raises(CheckpointError, match="allowed: weight_format int8 or int4, group_size 32"):
        open_model(stored)


@pytest.mark.parametrize("dtype", [Dtype.FLOAT32, Dtype.BFLOAT16], ids=lambda d: d.value)
def test_activations_have_the_dtype_asked_for(written, dtype):
    torch_dtype = getattr(torch, dtype.value)
    decoder = load_folder(written["k-60"], dtype=dtype, quantize=Quantize.INT8)
    expected = prompt_logits(load_folder(written["k-60"]), PROMPT)
    actual = prompt_logits(decoder, PROMPT, dtype=torch_dtype)
    assert actual.dtype == torch.float32
    assert (actual - expected).abs().mean() < 0.2 * expected.std()


# Which kernels run


@pytest.mark.parametrize("value", [None, "auto", "reference"])
def test_kernels_this_build_has_are_chosen_and_explained(value):
    choice = kernel_choice_from({} if value is None else {"HEADRACE_KERNELS": value})
    kernels = resolve_kernels(choice)
    assert choice is KernelChoice(value or "auto")
    reason = "asked for by HEADRACE_KERNELS=reference" if value == "reference" else "auto: "
    implementation = "cpu" if HAS_NATIVE and value != "reference" else "reference"
    assert {row.implementation for row in kernels.explain()} == {implementation}
    assert all(row.reason.startswith(reason) for row in kernels.explain())
    not_ops = {
        "choices",
        "dataflow",
        "device",
        "join_replays",
        "prefill_library_obstacle",
        "machine",
        "pads_steps",
        "set_num_threads",
        "softmax_schemes",
        "stream",
        "tuning_key",
    }
    assert {row.op for row in kernels.explain()} == set(type(kernels).__dataclass_fields__) - not_ops


def test_kernels_asked_for_by_name_raise_where_they_cannot_run(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    choice = kernel_choice_from({"HEADRACE_KERNELS": "triton"})
    with pytest.raises(BackendUnavailable, match="Triton kernels need a GPU"):
        resolve_kernels(choice)


@pytest.mark.parametrize(
    ("problem", "reason"),
    [
        ("the native module was not built: no headers", "the native module was not built: no headers"),
        ("libm.so.6: not found", "the native module does not load: libm.so.6: not found"),
    ],
)
def test_without_the_native_module_auto_says_why_and_its_name_raises(monkeypatch, problem, reason):
    def fail(name: str) -> None:
        raise ImportError(problem)

    monkeypatch.setattr(dispatch, "import_module", fail)
    rows = resolve_kernels(KernelChoice.AUTO).explain()
    assert all((row.implementation, row.reason) == ("reference", f"auto: {reason}") for row in rows)
    with pytest.raises(BackendUnavailable, match=f"asked for by HEADRACE_KERNELS=cpu, but {reason}"):
        resolve_kernels(KernelChoice.CPU)


@pytest.mark.parametrize(
    ("value", "hint"),
    [("refrence", "did you mean 'reference'"), ("Triton", "did you mean 'triton'"), ("", "known: auto, cpu, ")],
)
def test_nonsense_in_the_variable_is_refused_with_the_nearest_name(value, hint):
    with pytest.raises(ConfigError, match=f"HEADRACE_KERNELS is '{value}'; {hint}"):
        kernel_choice_from({"HEADRACE_KERNELS": value})


def test_engine_reads_the_variable(written, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv("HEADRACE_KERNELS", "triton")
    with pytest.raises(BackendUnavailable):
        LLM(model=str(written["k-64"]))
