"""Calibration of the asynchronized softmax: ranges against brute force, what follows from them, the file, its use."""

import json
import math
from dataclasses import asdict, replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from profile_run import run_profile_on_cpu
from safetensors.torch import load_file, save_file
from tiny_model import write_tiny_model

import headrace
from headrace.calibration_text import calibration_text
from headrace.cli.main import main
from headrace.config import EngineConfig, KvCacheFormat, LoadConfig, SamplingParams, SoftmaxScheme
from headrace.demo_model import demo_model_path
from headrace.engine.calibrate import LogitObserver, calibrate
from headrace.engine.softmax import force_asynchronized
from headrace.errors import CheckpointError, ConfigError
from headrace.kernels import KernelChoice, SoftmaxSpec, kernel_choice_from, resolve_kernels
from headrace.models import softmax_calibration
from headrace.models.softmax_calibration import (
    FILE_NAME,
    LogitRange,
    asynchronized_spec,
    choose_layer,
    load_calibration,
    save_calibration,
    sound_interval,
)

TEXT = calibration_text()[:1200]
RANGE = LogitRange(
    least=-9.0,
    low_quantile=-8.0,
    high_quantile=6.0,
    largest=7.0,
    least_row_max=-3.0,
    largest_row_max=7.0,
    largest_value=2.5,
)
NATIVE = SoftmaxScheme.ASYNCHRONIZED in resolve_kernels(kernel_choice_from()).softmax_schemes
needs_native = pytest.mark.skipif(not NATIVE, reason="only the native kernels have an asynchronized softmax")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def own_tiny(tmp_path):
    return write_tiny_model(tmp_path / "model")


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def scale_queries(folder, factor):
    weights = load_file(folder / "model.safetensors")
    scaled = {name: tensor * factor if "q_proj" in name else tensor for name, tensor in weights.items()}
    save_file(scaled, folder / "model.safetensors", metadata={"format": "pt"})


def calibrated(folder, texts=(TEXT,)):
    return calibrate(EngineConfig(load=LoadConfig(model=str(folder))), list(texts))


def float64_logits(folder, texts):
    """The same Llama by transformers in float64: for each layer, the logits of all rows, and the largest |v|."""
    from transformers import LlamaForCausalLM
    from transformers.models.llama import modeling_llama

    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float64, attn_implementation="eager")
    tokenizer = headrace.LLM(str(folder)).engine.model.tokenizer
    layers = [([], []) for _ in model.model.layers]
    eager = modeling_llama.eager_attention_forward

    def watch(module, query, key, value, attention_mask, scaling, **kwargs):
        group = query.shape[1] // key.shape[1]
        scores = query @ key.repeat_interleave(group, 1).transpose(2, 3) * scaling
        visible = torch.ones(scores.shape[-2:]).tril().bool()
        logits, values = layers[module.layer_idx]
        logits.extend(row[seen] for head in scores[0] for row, seen in zip(head, visible, strict=True))
        values.append(value.abs().max().item())
        return eager(module, query, key, value, attention_mask, scaling=scaling, **kwargs)

    modeling_llama.eager_attention_forward = watch
    try:
        with torch.inference_mode():
            for text in texts:
                model(torch.tensor([tokenizer.encode(text)]))
    finally:
        modeling_llama.eager_attention_forward = eager
    return layers


def test_ranges_are_those_of_a_float64_model(tiny):
    texts = (TEXT, "Two texts do not see each other.")
    found = calibrated(tiny, texts).layers
    expected = float64_logits(tiny, texts)
    assert len(found) == len(expected) == 2
    for layer, (rows, values) in zip(found, expected, strict=True):
        logits, row_max = torch.cat(rows).sort().values, torch.stack([row.max() for row in rows])
        low, high = (logits[round(share * (len(logits) - 1))].item() for share in (0.00005, 0.99995))
        assert asdict(layer) == pytest.approx(
            {
                "least": logits[0].item(),
                "low_quantile": low,
                "high_quantile": high,
                "largest": logits[-1].item(),
                "least_row_max": row_max.min().item(),
                "largest_row_max": row_max.max().item(),
                "largest_value": max(values),
            },
            rel=2e-3,
            abs=2e-3,
        )


def test_what_loading_runs_on_a_gpu_is_not_observed(tiny, monkeypatch):
    """Ranges of the steps that size its memory were taken for those of the layers."""
    expected = calibrated(tiny)
    run_profile_on_cpu(monkeypatch)
    found = calibrated(tiny)
    assert found.layers == expected.layers
    assert len(found.counts or ()) == len(expected.counts or ())


def test_an_observer_leaves_out_what_a_query_may_not_see():
    observer = LogitObserver()
    scores = torch.tensor([[[1.0, 99.0], [-2.0, -3.0]]])
    observer.add(scores, torch.tensor([[True, False], [True, True]]), torch.tensor([-4.0]))
    found = observer.result()
    assert (found.least, found.largest) == (-3.0, 1.0)
    assert (found.least_row_max, found.largest_row_max, found.largest_value) == (-2.0, 1.0, 4.0)


def test_logits_that_are_not_finite_are_refused():
    visible = torch.ones(1, 1, dtype=torch.bool)
    for scores, value in (([[[math.nan]]], 1.0), ([[[math.inf]]], 1.0), ([[[1.0]]], math.nan)):
        with pytest.raises(ConfigError, match="not finite"):
            LogitObserver().add(torch.tensor(scores), visible, torch.tensor([value]))


finite = st.floats(-300, 300)


@given(finite, finite, st.floats(0, 1e6), st.integers(1, 2**20), st.sampled_from(KvCacheFormat))
def test_a_layer_is_on_if_its_rows_fit_with_the_margin_on_both_sides(a, b, largest_value, n, cache_format):
    low, high = sorted((a, b))
    observed = replace(
        RANGE, least=low, least_row_max=low, largest_row_max=high, largest=high, largest_value=largest_value
    )
    choice = choose_layer(observed, max_model_len=n, cache_format=cache_format)
    below, above = sound_interval(num_keys=n, largest_value=largest_value, cache_format=cache_format)
    if choice.reason is None:
        assert low - choice.softmax.unified_max >= below + 20 - 1e-6
        assert high - choice.softmax.unified_max <= above - 20 + 1e-6
        assert choice.safe_row_max[0] < low <= high < choice.safe_row_max[1]
    else:
        assert choice.softmax == SoftmaxSpec()
        assert high - low > above - below - 40 - 1e-6


@pytest.mark.parametrize(("cache_format", "exponent"), [(KvCacheFormat.FLOAT32, -102), (KvCacheFormat.INT8, -64)])
def test_the_sound_interval_is_that_of_the_sums(cache_format, exponent):
    n, v = 4096, 1000.0
    low, high = sound_interval(num_keys=n, largest_value=v, cache_format=cache_format)
    assert math.exp(low) == pytest.approx(n * 2.0**exponent)
    assert n * math.exp(high) <= 2.0**126 * (1 + 1e-9)
    assert n * math.exp(high) * v <= 2.0**128 * (1 + 1e-9)


def test_rows_too_far_apart_switch_a_layer_off_with_the_reason(own_tiny):
    scale_queries(own_tiny, 400.0)
    result = calibrated(own_tiny)
    for layer, choice in zip(result.layers, result.choices, strict=True):
        assert choice.softmax.scheme is SoftmaxScheme.SYNCHRONIZED
        assert f"row maxima from {layer.least_row_max:.1f} to {layer.largest_row_max:.1f}, a span of" in choice.reason
        assert "float32 has room for" in choice.reason


@needs_native
def test_calibrated_text_recomputes_no_row_and_every_row_is_counted(tiny):
    result = calibrated(tiny)
    for choice, count in zip(result.choices, result.counts, strict=True):
        assert choice.softmax.scheme is SoftmaxScheme.ASYNCHRONIZED
        assert (count.num_rows, count.num_recomputed_rows) == (4 * result.num_tokens, 0)


@needs_native
def test_layers_that_are_off_are_forced_to_count_what_they_would_compute_again(own_tiny):
    """Each row whose maximum lies outside what the constant suits, by transformers in float64, and no other."""
    scale_queries(own_tiny, 400.0)
    result = calibrated(own_tiny)
    rows = float64_logits(own_tiny, (TEXT,))
    for layer, choice, count, (logits, _) in zip(result.layers, result.choices, result.counts, rows, strict=True):
        assert choice.reason is not None
        sizes = {"max_model_len": 8192, "cache_format": KvCacheFormat.FLOAT32}
        constant = asynchronized_spec(layer, **sizes).unified_max
        assert constant == pytest.approx(
            (layer.least_row_max + layer.largest_row_max) / 2
            - sum(sound_interval(num_keys=8192, largest_value=layer.largest_value, cache_format=sizes["cache_format"]))
            / 2
        )
        # A row is computed again when its sum leaves the floats; the largest logit says so but for log(row length).
        distance = torch.stack([row.max() for row in logits]) - constant
        num_outside, num_near = int((distance.abs() > 96).sum()), int((distance.abs() > 60).sum())
        assert count.num_rows == 4 * result.num_tokens
        assert 0 < num_outside <= count.num_recomputed_rows <= num_near


@needs_native
def test_recomputed_rows_are_counted_on_other_text(tiny):
    config = EngineConfig(load=LoadConfig(model=str(tiny)))
    result = calibrate(config, [TEXT], check_texts=["Two other texts.", "They are short."])
    tokenizer = headrace.LLM(str(tiny)).engine.model.tokenizer
    num_checked = sum(len(tokenizer.encode(text)) for text in ("Two other texts.", "They are short."))
    assert (result.num_tokens, result.num_checked_tokens) == (len(tokenizer.encode(TEXT)), num_checked)
    assert [count.num_rows for count in result.counts] == [4 * num_checked] * 2
    assert result.layers == calibrated(tiny).layers


@needs_native
def test_without_a_calibration_rows_far_from_zero_are_computed_again(own_tiny):
    scale_queries(own_tiny, 60.0)
    outputs = {}
    for softmax in ("synchronized", "asynchronized"):
        llm = headrace.LLM(str(own_tiny), softmax=softmax)
        [outputs[softmax]] = llm.generate([TEXT], SamplingParams(temperature=0, max_tokens=8))
    assert outputs["synchronized"].outputs[0].token_ids == outputs["asynchronized"].outputs[0].token_ids
    counts = llm.engine.model.executor.worker._runner._kv_pool.softmax_counts()
    assert any(0 < count.num_recomputed_rows < count.num_rows for count in counts)
    assert any(layer.largest_row_max > 89 for layer in calibrated(own_tiny).layers)


@needs_native
@pytest.mark.parametrize("kv_cache_dtype", ["float32", "int8"])
def test_greedy_text_is_the_same_with_a_calibration(own_tiny, kv_cache_dtype):
    prompts, params = [TEXT, "a b c", "Once"], SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)

    def tokens(softmax):
        llm = headrace.LLM(str(own_tiny), softmax=softmax, kv_cache_dtype=kv_cache_dtype)
        return [output.outputs[0].token_ids for output in llm.generate(prompts, params)]

    expected = tokens("synchronized")
    save_calibration(calibrated(own_tiny).layers, own_tiny / FILE_NAME)
    assert tokens("asynchronized") == expected


@needs_native
def test_an_engine_uses_the_constants_of_its_folder(own_tiny, monkeypatch):
    from headrace.engine import load_rank

    made = []
    original = load_rank.LayerContext
    monkeypatch.setattr(load_rank, "LayerContext", lambda **fields: made.append(original(**fields)) or made[-1])
    layers = (RANGE, replace(RANGE, least=-500.0, least_row_max=-500.0))
    save_calibration(layers, own_tiny / FILE_NAME)
    for softmax in ("asynchronized", "auto"):
        headrace.LLM(str(own_tiny), softmax=softmax)
    first = choose_layer(RANGE, max_model_len=8192, cache_format=KvCacheFormat.FLOAT32).softmax
    assert made[0].softmax == (first, SoftmaxSpec())
    assert made[1].softmax == (SoftmaxSpec(), SoftmaxSpec())


def test_a_file_gives_back_what_was_saved(tmp_path):
    file = tmp_path / FILE_NAME
    layers = (RANGE, replace(RANGE, largest_value=3.0))
    save_calibration(layers, file)
    assert load_calibration(file, num_layers=2) == layers
    assert [path.name for path in tmp_path.iterdir()] == [FILE_NAME]
    assert load_calibration(tmp_path / "none.json", num_layers=2) is None


def _content(**changes):
    return {"version": 1, "layers": [asdict(RANGE) | changes]}


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "[" * 100_000,
        '{"version": 2, "layers": []}',
        '{"version": 1, "layers": {}}',
        json.dumps({"version": 1, "layers": []}),
        json.dumps({"version": 1, "layers": [7]}),
        json.dumps({"version": 1, "layers": [{"least": 1.0}]}),
        json.dumps(_content(extra=1.0)),
        json.dumps(_content(least=None)),
        json.dumps(_content(least=True)),
        json.dumps(_content(largest=math.inf)),
        json.dumps(_content(largest=math.nan)),
        json.dumps(_content(largest=10**400)),
        json.dumps(_content(least_row_max=8.0)),
        json.dumps(_content(largest_row_max=7.5)),
        json.dumps(_content(low_quantile=6.5)),
        json.dumps(_content(largest_value=-1.0)),
    ],
)
def test_a_broken_file_says_to_calibrate_again(tmp_path, text):
    file = tmp_path / FILE_NAME
    file.write_text(text)
    with pytest.raises(CheckpointError, match="run `headrace calibrate` for this model again"):
        load_calibration(file, num_layers=1)


@needs_native
def test_a_broken_file_stops_only_an_engine_that_needs_it(own_tiny):
    (own_tiny / FILE_NAME).write_text("{}")
    with pytest.raises(CheckpointError, match="headrace calibrate"):
        headrace.LLM(str(own_tiny), softmax="asynchronized")
    headrace.LLM(str(own_tiny), softmax="synchronized")


def test_reference_kernels_observe_and_refuse_to_be_asynchronized(tiny, monkeypatch):
    monkeypatch.setenv("HEADRACE_KERNELS", KernelChoice.REFERENCE.value)
    result = calibrated(tiny)
    assert result.counts is None
    with pytest.raises(ConfigError, match="softmax is 'asynchronized', which these kernels lack"):
        headrace.LLM(str(tiny), softmax="asynchronized")


def test_the_command_keeps_ranges_and_shows_a_table(own_tiny, capsys):
    assert main(["calibrate", "--model", str(own_tiny)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split("  ")[0] == "layer"
    assert [line.split()[0] for line in lines[1:3]] == ["0", "1"]
    layers = load_calibration(own_tiny / FILE_NAME, num_layers=2)
    assert f"{layers[0].least_row_max:.1f} .. {layers[0].largest_row_max:.1f}" in lines[1]


@needs_native
def test_the_command_shows_rates_of_layers_that_are_off(own_tiny, tmp_path, capsys):
    scale_queries(own_tiny, 400.0)
    text = tmp_path / "check.txt"
    text.write_text(TEXT[:400], encoding="utf-8")
    assert main(["calibrate", "--model", str(own_tiny), "--check-text", str(text)]) == 0
    out = capsys.readouterr().out
    first = out.splitlines()[1].split()
    assert first[0] == "0"
    assert "off" in first
    num_tokens = len(headrace.LLM(str(own_tiny)).engine.model.tokenizer.encode(TEXT[:400]))
    assert first[-1] == str(4 * num_tokens)
    assert 0 < float(first[-3].rstrip("%")) < 100
    assert f"of {8 * num_tokens} rows" in out
    assert f"of {num_tokens} tokens." in out
    assert "Layers that are off were forced for this count" in out


def test_the_command_as_json_with_texts_of_ones_own(own_tiny, tmp_path, capsys):
    files = [tmp_path / name for name in ("a.txt", "b.txt")]
    for file in files:
        file.write_text("ein Text für sich", encoding="utf-8")
    output = tmp_path / "ranges.json"
    texts = [part for file in files for part in ("--text", str(file))]
    assert main(["calibrate", "--model", str(own_tiny), "--json", "--output", str(output), *texts]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["file"] == str(output)
    assert not (own_tiny / FILE_NAME).exists()
    layers = load_calibration(output, num_layers=2)
    assert [{name: layer[name] for name in asdict(RANGE)} for layer in shown["layers"]] == list(map(asdict, layers))
    if NATIVE:
        assert all(layer["num_rows"] == 4 * shown["num_tokens"] for layer in shown["layers"])


@pytest.mark.parametrize(
    ("content", "output", "message"),
    [
        (b"\xff\xfe", "out.json", "UTF-8"),
        (b"  ", "out.json", "empty"),
        (b"text", "none/out.json", "cannot be written: there is no folder"),
        (b"text", ".", "cannot be written: it is a folder"),
    ],
)
def test_mistakes_get_one_line(own_tiny, tmp_path, capsys, content, output, message):
    file = tmp_path / "text.txt"
    file.write_bytes(content)
    command = ["calibrate", "--model", str(own_tiny), "--text", str(file), "--output", str(tmp_path / output)]
    assert main(command) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert message in line


def num_layers_off(folder, num_layers=4):
    forced = force_asynchronized(folder, num_layers=num_layers, max_model_len=1024, cache_format=KvCacheFormat.BFLOAT16)
    return forced.num_layers_off


def test_a_calibration_of_the_model_that_ships_is_the_users(tmp_path, capsys):
    """It was written into the installed package: for everybody who uses that, or not at all where it is read-only."""
    before = set(demo_model_path().iterdir())
    (tmp_path / "link").symlink_to(demo_model_path())
    folders = (demo_model_path(), tmp_path / "link")
    assert [num_layers_off(folder) for folder in folders] == [None, None]
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    assert main(["calibrate", "--text", str(tmp_path / "text.txt"), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert set(demo_model_path().iterdir()) == before
    [file] = (tmp_path / "cache" / "headrace" / "calibration").iterdir()
    assert shown["file"] == str(file)
    num_off = sum(layer["reason"] is not None for layer in shown["layers"])
    assert [num_layers_off(folder) for folder in folders] == [num_off, num_off]
    if NATIVE:
        llm = headrace.LLM("demo", softmax="asynchronized")
        assert f"the calibration keeps {num_off} of 4 layers synchronized" in llm.engine.model.softmax.reason


def test_a_calibration_of_the_model_that_ships_ends_with_its_weights(own_tiny, monkeypatch):
    monkeypatch.setattr(softmax_calibration, "demo_model_path", own_tiny.resolve)
    save_calibration((RANGE, RANGE), softmax_calibration.prepare_calibration_file(own_tiny))
    assert num_layers_off(own_tiny, num_layers=2) == 0
    scale_queries(own_tiny, 2.0)
    assert num_layers_off(own_tiny, num_layers=2) is None


def test_a_cache_that_cannot_be_written_is_named_before_a_model_is_loaded(tmp_path, capsys, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert main(["calibrate"]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert "cannot be written: Not a directory; name another file with --output" in line


def test_a_read_only_folder_is_named_before_a_model_is_loaded(own_tiny, capsys, monkeypatch):
    monkeypatch.setattr(softmax_calibration.os, "access", lambda *_: False)
    assert main(["calibrate", "--model", str(own_tiny)]) == 2
    assert "is read-only; name another file with --output" in capsys.readouterr().err
