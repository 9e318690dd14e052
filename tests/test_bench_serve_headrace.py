"""`headrace bench serve` on Headrace's own server, and the same load on an engine without one."""

import json

import pytest

from bench.engine_load import closed_loop, figures, requests
from headrace import LLM
from headrace.bench.serve.lengths import RequestMix
from headrace.bench.serve.metrics import summarize
from headrace.cli.main import main
from headrace.demo_model import demo_model_path

pytest_plugins = ["tests.server_fixtures"]

MIX = "9-30:3-7"
VOCAB_SIZE = 900


@pytest.fixture
def report(server, capsys):
    def call(*argv):
        seed = () if "--seed" in argv else ("--seed", "1")
        assert main(["bench", "serve", "--json", "--base-url", server.url, *map(str, argv), *seed]) == 0
        return json.loads(capsys.readouterr().out)

    return call


@pytest.fixture(scope="module")
def alone():
    """Records of the engine alone."""
    with LLM(demo_model_path(), num_threads=1, dataflow="default", max_num_seqs=8) as llm:
        return closed_loop(llm.engine, requests(VOCAB_SIZE, RequestMix.parse(MIX), 5), 4, 12)


def test_the_server_gets_and_counts_what_the_engine_alone_does(report, alone, tmp_path):
    """The same seed makes the same requests in both: prompts and outputs have the same lengths, one by one."""
    file = tmp_path / "requests.jsonl"
    found = report(
        *("--request-mix", MIX, "--vocab-size", VOCAB_SIZE, "--seed", 5, "--ignore-eos"),
        *("--concurrency", 4, "--num-requests", 12, "--requests-out", file),
    )
    lengths = sorted((r.prompt_tokens, r.output_tokens) for r in alone)
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert sorted((line["prompt_tokens"], line["output_tokens"]) for line in lines) == lengths
    assert len(set(lengths)) > 5
    assert (found["num_completed"], found["num_failed"], found["num_short_outputs"]) == (12, 0, 0)
    assert found["has_server_counts"]
    assert found["cached_tokens"] == 0
    assert found["peak_concurrency"] == 4


def test_the_engine_alone_counts_all_tokens(alone):
    assert all(r.output_tokens == r.asked_output_tokens == len(r.chunk_s) for r in alone)
    assert all(r.prompt_tokens == r.asked_prompt_tokens for r in alone)
    found = figures(summarize(alone))
    assert (found["num_completed"], found["num_failed"], found["peak_concurrency"]) == (12, 0, 4)


def test_figures_have_the_names_of_the_command(report, alone):
    found = report("--num-requests", 2, "--request-mix", "5:4", "--ignore-eos")
    assert set(figures(summarize(alone))) <= set(found)


def test_chats_are_fitted_with_its_tokenizer(report):
    found = report("--endpoint", "chat", "--rate", 50, "--num-requests", 6, "--request-mix", "40:5", "--ignore-eos")
    assert found["prompts_are"] == "random words, fitted with the server's tokenizer"
    assert found["output_tokens"] == 30
    # The chat template's own tokens come on top.
    assert 6 * 38 <= found["prompt_tokens"] <= 6 * 50


def test_a_shared_beginning_is_found_in_its_cache(report):
    shared = ("--seed", 2, "--request-mix", "64:2", "--vocab-size", VOCAB_SIZE, "--concurrency", 1, "--num-requests", 6)
    found = report(*shared, "--shared-prefix-tokens", 48)
    assert found["cached_tokens"] == 6 * 48
    assert "from a prefix cache" in " ".join(found["remarks"])


def test_what_it_refuses_is_counted(server, capsys):
    argv = [
        "--request-mix",
        "5:4:1,5000:4:1",
        "--vocab-size",
        VOCAB_SIZE,
        "--num-requests",
        12,
        "--warmup",
        0,
        "--seed",
        1,
    ]
    assert main(["bench", "serve", "--json", "--base-url", server.url, "--model", "demo", *map(str, argv)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {failure["status"] for failure in found["failures"]} == {400}
    assert 0 < found["num_failed"] == sum(failure["count"] for failure in found["failures"]) < 12
