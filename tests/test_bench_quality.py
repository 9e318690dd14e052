"""The quality report: scores against transformers, the divergence against brute force, what it refuses."""

import json
import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_model import write_tiny_model

import headrace
from headrace.bench import quality as module
from headrace.bench.quality import FORMATS, REFERENCE, TokenScore, compare, divergence, measure_quality, score_windows
from headrace.calibration_text import calibration_text
from headrace.cli.bench_quality import _FORMATS
from headrace.cli.main import main
from headrace.config import EngineConfig, KvCacheFormat, LoadConfig, SchedulerConfig, WeightFormat
from headrace.engine.text_windows import token_windows

TEXT = calibration_text()[:1500]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def llm(tiny):
    return headrace.LLM(str(tiny), max_model_len=200)


@pytest.fixture
def run(capsys):
    def call(*argv):
        code = main(["bench", "quality", *map(str, argv)])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def float32_logprobs(folder, windows):
    """[num_tokens, vocab_size] of every position that predicts one, by transformers."""
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.inference_mode():
        logits = [model(torch.tensor([window])).logits[0, :-1] for window in windows]
    return torch.cat(logits).log_softmax(-1)


def test_scores_are_those_of_transformers(tiny, llm):
    windows = list(token_windows(llm.engine.model, [TEXT, "Another text."]))
    assert len(windows) > 2
    assert max(map(len, windows)) == 199
    heard = []
    scores = score_windows(llm.engine, windows, heard.append)
    expected = float32_logprobs(tiny, windows)
    targets = torch.tensor([token_id for window in windows for token_id in window[1:]])
    loss = torch.nn.functional.nll_loss(expected, targets).item()
    assert compare(scores, scores).loss == pytest.approx(loss, abs=1e-4)
    assert [score.logprob for score in scores] == pytest.approx(
        expected.gather(1, targets[:, None])[:, 0].tolist(), abs=1e-3
    )
    sorted_logprobs = expected.sort(descending=True).values
    is_clear = (sorted_logprobs[:, 0] - sorted_logprobs[:, 1] > 1e-3).tolist()
    assert sum(is_clear) > 0.9 * len(scores)
    for score, token_id, clear in zip(scores, expected.argmax(-1).tolist(), is_clear, strict=True):
        assert score.greedy == token_id or not clear
    assert heard == [f"text {i} of {len(windows)}" for i in range(1, len(windows) + 1)]


def test_each_format_is_what_its_name_says(tiny, monkeypatch):
    loaded = []
    original = module.load_model
    monkeypatch.setattr(module, "load_model", lambda config: loaded.append(original(config)) or loaded[-1])
    config = EngineConfig(load=LoadConfig(model=str(tiny)), num_threads=1)
    found = list(measure_quality(config, [TEXT[:200]], FORMATS, lambda _: None))
    assert [quality.quality_format.name for quality in found] == [
        *("float32", "bfloat16", "int8", "int4", "float32-kv-bfloat16", "bfloat16-kv-int8", "int4-kv-int8")
    ]
    formats = {(model.formats.linear, model.formats.dense, model.kv_cache_format) for model in loaded}
    bfloat16, float32 = WeightFormat.BFLOAT16, WeightFormat.FLOAT32
    assert formats == {
        (float32, float32, KvCacheFormat.FLOAT32),
        (float32, float32, KvCacheFormat.BFLOAT16),
        (bfloat16, bfloat16, KvCacheFormat.BFLOAT16),
        (bfloat16, bfloat16, KvCacheFormat.INT8),
        (WeightFormat.INT8, bfloat16, KvCacheFormat.BFLOAT16),
        (WeightFormat.INT4, bfloat16, KvCacheFormat.BFLOAT16),
        (WeightFormat.INT4, bfloat16, KvCacheFormat.INT8),
    }
    by_name = {quality.quality_format.name: quality for quality in found}
    same = by_name["bfloat16"].comparison
    assert (same.loss_difference, same.difference_error, same.agreement, same.divergence) == (0, 0, 1, 0)
    for name, other in by_name.items():
        assert other.comparison.loss_difference == pytest.approx(other.comparison.loss - same.loss, abs=1e-9)
        assert name == "bfloat16" or other.comparison.divergence > 0
    assert by_name["int4"].comparison.divergence > by_name["int8"].comparison.divergence
    assert by_name["int4"].weight_bytes < by_name["int8"].weight_bytes < by_name["bfloat16"].weight_bytes


def logprobs(weights):
    total = math.log(math.fsum(map(math.exp, weights)))
    return [weight - total for weight in weights]


@given(
    st.lists(st.tuples(st.floats(-8, 8), st.floats(-8, 8)), min_size=2, max_size=12),
    st.sets(st.integers(0, 11)),
    st.sets(st.integers(0, 11)),
)
def test_divergence_is_a_lower_bound_that_naming_all_tokens_reaches(weights, named_p, named_q):
    p, q = (logprobs(column) for column in zip(*weights, strict=True))
    exact = math.fsum(math.exp(a) * (a - b) for a, b in zip(p, q, strict=True))
    some = divergence({i: p[i] for i in named_p if i < len(p)}, {i: q[i] for i in named_q if i < len(q)})
    assert 0 <= some <= exact + 1e-9
    assert divergence(dict(enumerate(p)), dict(enumerate(q))) == pytest.approx(exact, abs=1e-9)


def test_comparison_by_hand():
    def score(logprob, greedy):
        return TokenScore(logprob=logprob, likely={1: math.log(0.5)}, greedy=greedy)

    expected = [score(-1.0, 1), score(-2.0, 1), score(-3.0, 2)]
    found = compare(expected, [score(-1.5, 1), score(-2.0, 2), score(-2.5, 2)])
    assert (found.num_tokens, found.loss, found.loss_difference) == (3, 2.0, 0.0)
    assert found.agreement == pytest.approx(2 / 3)
    assert found.divergence == 0
    differences = np.array([0.5, 0.0, -0.5])
    assert found.difference_error == pytest.approx(differences.std(ddof=1) / np.sqrt(3))


def test_json_has_every_figure_of_the_formats_asked_for(run, tiny, tmp_path):
    file = tmp_path / "text.txt"
    file.write_text(TEXT[:300], encoding="utf-8")
    code, out, err = run("--model", tiny, "--json", "--text", file, "--text", file, "--formats", "int8", "float32")
    report = json.loads(out)
    assert (code, err) == (0, "")
    assert [row["name"] for row in report["formats"]] == ["float32", "int8"]
    for row in report["formats"]:
        assert row.keys() == {
            *("name", "linear", "kv_cache", "weight_bytes", "num_tokens", "loss", "loss_difference"),
            *("difference_error", "agreement", "divergence"),
        }
    tokenizer = headrace.LLM(str(tiny)).engine.model.tokenizer
    assert report["formats"][0]["num_tokens"] == 2 * (len(tokenizer.encode(TEXT[:300])) - 1)
    assert report["text"] == [str(file), str(file)]


def test_table_has_a_row_for_each_format(run, tiny):
    code, out, _ = run("--model", tiny, "--formats", "int4", "--max-model-len", "100")
    lines = out.splitlines()
    assert code == 0
    assert lines[0].split() == ["format", "weights", "loss", "to", "bfloat16", "same", "token", "divergence"]
    assert lines[1].split()[0] == "int4"
    assert "plain English inside the package" in lines[-1]


def test_names_of_formats_are_offered_without_torch():
    assert tuple(quality_format.name for quality_format in FORMATS) == _FORMATS
    assert REFERENCE in FORMATS


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--quantize", "int4"], "--quantize is 'int4'; leave it out, --formats says what is compared"),
        (["--dtype", "float32"], "--dtype is 'float32'; leave it out"),
        (["--kv-cache-dtype", "int8"], "--kv-cache-dtype is 'int8'; leave it out"),
        (["--formats", "int5"], "int5"),
        (["--text", "/none/text.txt"], "cannot read '/none/text.txt'"),
    ],
)
def test_mistakes_get_one_line(run, tiny, argv, message):
    code, out, err = run("--model", tiny, *argv)
    assert (code, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1


def test_a_text_of_one_token_is_too_short(run, tiny, tmp_path):
    file = tmp_path / "text.txt"
    file.write_text("a", encoding="utf-8")
    code, _, err = run("--model", tiny, "--text", file)
    assert code == 2
    assert "the text is too short to be scored" in err


def test_a_quantized_checkpoint_is_refused(run, tiny, tmp_path):
    assert main(["quantize", "--model", str(tiny), "--quantize", "int8", "--output", str(tmp_path / "int8")]) == 0
    code, _, err = run("--model", tmp_path / "int8")
    assert code == 2
    assert "the checkpoint's weights are int8 already; give the one that they were made from" in err


def test_windows_lose_no_token(llm):
    model = llm.engine.model
    [token_ids] = [model.tokenizer.encode(TEXT)]
    windows = list(token_windows(model, [TEXT]))
    assert [token_id for window in windows for token_id in window] == token_ids
    assert all(len(window) == 199 for window, _ in pairwise(windows))


def test_a_longer_window_than_a_step_is_scored_alike(tiny, llm):
    [window, *_] = token_windows(llm.engine.model, [TEXT])
    small = SchedulerConfig.max_num_seqs
    chunked = headrace.LLM(str(tiny), max_model_len=200, max_num_batched_tokens=small)
    whole, parts = (score_windows(engine, [window], lambda _: None) for engine in (llm.engine, chunked.engine))
    assert [score.logprob for score in parts] == pytest.approx([score.logprob for score in whole], abs=1e-5)
