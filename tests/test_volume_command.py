"""`headrace volume`: what it prints, what it refuses, and that it needs neither weights nor torch."""

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import pytest
from test_volume import (
    LLAMA_8B,
    LLAMA_13B,
    MODELS,
    PIPELINE_PARALLEL,
    REQUEST,
    SMALL_MIXTRAL,
    TENSOR_PARALLEL,
    model,
)

from headrace.cli.main import main
from headrace.cli.volume_lines import volume_lines
from headrace.cli.volume_plot import curves_by_length, curves_by_ranks
from headrace.cli.volume_report import VolumeReport
from headrace.config import Dtype, KvSharding, ParallelConfig
from headrace.costs.exchanges import Layout
from headrace.costs.sites import Phase
from headrace.costs.summary import site_kind, summarize
from headrace.costs.volume import predict_request
from headrace.errors import CheckpointError, ConfigError
from headrace.models.config_file import read_config_file

MIXTURE = SMALL_MIXTRAL | {"hidden_size": 48, "num_hidden_layers": 5, "vocab_size": 97}


@pytest.fixture
def config_file(tmp_path):
    file = tmp_path / "config.json"
    file.write_text(json.dumps(LLAMA_8B))
    return file


@pytest.fixture
def volume(capsys, config_file):
    """Run the command; returns its exit code, output and error output."""

    def call(*argv):
        code = main(["volume", "--model", str(config_file), *map(str, argv)])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


@pytest.fixture
def as_json(volume):
    def call(*argv):
        code, out, err = volume(*argv, "--json")
        assert (code, err) == (0, "")
        return json.loads(out)

    return call


def rows_of(report, account, **wanted):
    rows = report["accounts"][account]["rows"]
    return [row for row in rows if all(row[name] == value for name, value in wanted.items())]


def report(hf_config=LLAMA_8B, *, counted=None, request=REQUEST, **parallel):
    layout = Layout(model=model(hf_config), parallel=ParallelConfig(**parallel), activation_bytes=2)
    return VolumeReport(
        model_name="8B",
        dtype="bfloat16",
        layout=layout,
        request=request,
        max_num_batched_tokens=1024,
        counted=counted,
    )


class TestJson:
    def test_published(self, as_json):
        published = as_json("--tp", 4, "--pp", 2)["published"]
        assert published["v_tp"] == {
            "num_all_reduces": 65,
            "num_tokens": 255,
            "ring_factor": 1.5,
            "all_reduce_bytes": 203_673_600,
            "gather_bytes": 8_208_384,
            "total_bytes": 211_881_984,
        }
        assert published["v_pp"]["total_bytes"] == 4_177_920

    def test_literal_engine(self, as_json):
        found = as_json("--tp", 2, "--pp", 2)
        (embedding,) = rows_of(found, "literal", phase="decode", kind="embedding")
        assert (embedding["count"], embedding["wire_bytes"]) == (127, 127 * 8192)
        assert sum(row["count"] for row in rows_of(found, "literal", operation="all_reduce")) == 65 * 128
        assert sum(row["count"] for row in rows_of(found, "literal", operation="send")) == 2 * 128 * 2
        gathers = rows_of(found, "literal", operation="gather")
        assert (sum(row["count"] for row in gathers), sum(row["wire_bytes"] for row in gathers)) == (128, 16_416_768)
        assert rows_of(found, "literal_whole", operation="all_gather", kind="boundary") == []
        assert rows_of(found, "literal_whole", operation="all_gather", kind="logits") != []

    @pytest.mark.parametrize(
        ("how", "algorithm", "factor"),
        [
            ((), "two_shot", 1.5),
            (("--device", "cuda"), "ring", 1.5),
            (("--transport", "nccl"), "ring", 1.5),
            (("--device", "cpu", "--transport", "gloo"), "direct", 3),
        ],
    )
    def test_sums_go_as_the_transport_takes_them(self, as_json, how, algorithm, factor):
        """As many bytes leave a rank around a ring as in two shots."""
        sums = rows_of(as_json("--tp", 4, *how), "headrace", phase="prefill", operation="all_reduce")
        assert {row["algorithm"] for row in sums} == {algorithm}
        assert sum(row["wire_bytes"] for row in sums) == factor * 64 * 128 * 8192

    def test_headrace_moves_no_embeddings_logits_or_second_tensors(self, as_json):
        found = as_json("--tp", 2, "--pp", 2)
        assert {row["kind"] for row in rows_of(found, "headrace")} == {"attention", "mlp", "boundary", "candidates"}
        assert sum(row["count"] for row in rows_of(found, "headrace", operation="all_reduce")) == 64 * 128
        assert sum(row["count"] for row in rows_of(found, "headrace", operation="send")) == 2 * 128

    def test_literal_flags_make_headrace_literal(self, as_json):
        """Two ranks send as much in a ring as directly, but logits go to each of them."""
        found = as_json("--tp", 2, "--pp", 2, "--literal")
        mine, its = (found["accounts"][key]["total_wire_bytes"] for key in ("headrace", "literal_whole"))
        assert mine == its

    def test_totals_are_those_of_the_rows(self, as_json):
        found = as_json("--tp", 4, "--pp", 3, "--pp-layers", "10,20,2", "--batch", 3, "--prompt", 77, "--output", 5)
        assert found["layout"]["pipeline_layers"] == [10, 20, 2]
        assert len(found["accounts"]) == 3
        for account in found["accounts"].values():
            totals = account["total_wire_bytes"]
            for phase in ("prefill", "decode"):
                rows = [row for row in account["rows"] if row["phase"] == phase]
                assert sum(row["total_wire_bytes"] for row in rows) == totals[phase] > 0
            assert sum(account["wire_bytes_of_ranks"]) == totals["all"] == totals["prefill"] + totals["decode"]
            assert len(account["wire_bytes_of_ranks"]) == 12

    def test_float32_doubles(self, as_json):
        half, whole = (
            as_json("--tp", 2, "--dtype", dtype)["accounts"]["literal"]["total_wire_bytes"]["all"]
            for dtype in ("bfloat16", "float32")
        )
        assert whole == 2 * half

    def test_chunks(self, as_json):
        found = as_json("--tp", 2, "--max-num-batched-tokens", 32)
        (row,) = rows_of(found, "headrace", phase="prefill", kind="mlp")
        assert (row["count"], row["payload_bytes"]) == (32 * 4, 32 * 128 * 8192)

    def test_one_rank(self, as_json):
        found = as_json()
        for account in found["accounts"].values():
            assert account["rows"] == []
            assert (account["total_payload_bytes"], account["total_wire_bytes"]["all"]) == (0, 0)

    def test_nothing_was_counted(self, as_json):
        assert as_json("--tp", 2)["differences"] is None


class TestText:
    def test_tables(self, volume):
        code, out, err = volume("--tp", 2, "--pp", 2)
        assert (code, err) == (0, "")
        lines = [" ".join(line.split()) for line in out.splitlines()]
        assert "V_pp (p-1) (S_p+S_d-1) h b 2 1 x 255 x 4,096 x 2 x 2 sent on all links together 4,177,920" in lines
        assert "decode gather logits direct 127 16,288,512 16,288,512 16,288,512" in lines
        assert "decode send boundary point_to_point 254 1,040,384 1,040,384 2,080,768" in lines
        assert lines[-1] == "headrace 271,566,848 136,314,896 135,251,952 271,566,848 91.6%"
        assert "counted" not in out

    def test_one_rank(self, volume):
        _, out, _ = volume()
        assert out.count("nothing: one rank has nobody to send to") == 2

    def test_default_is_the_shipped_model(self, capsys):
        assert main(["volume", "--tp", "2"]) == 0
        assert "demo: 4 layers, hidden size 256" in capsys.readouterr().out


class TestMistakes:
    @pytest.mark.parametrize(
        ("argv", "complaint"),
        [
            (["--tp", "3"], "does not divide 32 attention heads and 8 KV heads; sizes that work: 1, 2, 4, 8, 16, 32"),
            (["--pp", "33"], "more than the model's 32 layers; sizes that work: 1 to 32"),
            (["--pp", "2", "--pp-layers", "1,2"], "pipeline_layers 1,2 add up to 3; the model has 32 layers"),
            (["--pp-layers", "x"], "not a list of layer counts"),
            (["--tp", "0"], "tensor_parallel_size is 0"),
            (["--prompt", "0"], "--prompt is 0; it must be at least 1"),
            (["--output", "-1"], "--output is -1; it must be at least 1"),
            (["--batch", "0"], "--batch is 0; it must be at least 1"),
            (["--batch", "33"], "give --max-num-seqs 33 or more"),
            (["--dtype", "int3"], "invalid choice: 'int3'"),
            (["--plot", "x.txt"], "must end in .png"),
            (["--plot", "no/such/x.png"], "no folder"),
            (["--model", "/no/such/place"], "'/no/such/place' does not exist"),
            (["--model", "nonsense"], "'nonsense' does not exist"),
        ],
    )
    def test_refused_in_one_line(self, volume, argv, complaint):
        code, out, err = volume(*argv)
        assert (code, out, err.count("\n")) == (2, "", 1)
        assert complaint in err

    @pytest.mark.parametrize(
        "text", ["", "[]", "{", '{"architectures": ["Nope"]}', json.dumps(LLAMA_8B | {"vocab_size": 0})]
    )
    def test_a_file_that_is_no_model(self, volume, config_file, text):
        config_file.write_text(text)
        code, out, err = volume()
        assert (code, out, err.count("\n")) == (2, "", 1)

    def test_a_folder_without_config(self, volume, tmp_path):
        (tmp_path / "empty").mkdir()
        _, _, err = volume("--model", tmp_path / "empty")
        assert "has no config.json" in err


class TestConfigFile:
    def test_file_and_folder(self, config_file):
        assert read_config_file(str(config_file)).model == read_config_file(str(config_file.parent)).model

    @pytest.mark.parametrize(
        ("stored", "asked", "expected"),
        [
            ({"torch_dtype": "float16"}, Dtype.AUTO, ("bfloat16", 2)),
            ({"torch_dtype": "float32"}, Dtype.AUTO, ("float32", 4)),
            ({"torch_dtype": None, "dtype": "bfloat16"}, Dtype.AUTO, ("bfloat16", 2)),
            ({"torch_dtype": "bfloat16"}, Dtype.FLOAT32, ("float32", 4)),
            ({"torch_dtype": None}, Dtype.BFLOAT16, ("bfloat16", 2)),
        ],
    )
    def test_dtype_is_that_of_loading(self, config_file, stored, asked, expected):
        config_file.write_text(json.dumps(LLAMA_8B | stored))
        found = read_config_file(str(config_file))
        assert (found.activation_dtype(asked), found.activation_bytes(asked)) == expected

    def test_no_dtype(self, config_file):
        config_file.write_text(json.dumps(LLAMA_8B | {"torch_dtype": None}))
        with pytest.raises(ConfigError, match="give --dtype bfloat16 or float32"):
            read_config_file(str(config_file)).activation_bytes(Dtype.AUTO)

    def test_a_hub_id_without_the_hub(self, monkeypatch):
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        with pytest.raises(CheckpointError, match=r"config.json of 'no-such-org/no-such-model' is not in"):
            read_config_file("no-such-org/no-such-model")


class TestCounted:
    """What a run counted, beside the prediction."""

    def counted(self, **parallel):
        return predict_request(report(**parallel).layout, REQUEST, 1024)

    def test_agreement(self):
        parallel = {"tensor_parallel_size": 2, "pipeline_parallel_size": 2}
        compared = report(counted=self.counted(**parallel), **parallel)
        assert compared.differences() == []
        assert compared.to_json()["differences"] == []
        accounts = compared.to_json()["accounts"]
        assert accounts["counted"] == accounts["headrace"]
        assert list(volume_lines(compared))[-1] == "Counted equals predicted to the byte, on every rank."

    def test_every_difference_is_named_with_its_rank(self):
        parallel = {"tensor_parallel_size": 2, "pipeline_parallel_size": 2}
        ranks = self.counted(**parallel)
        ranks[3] = [replace(ranks[3][0], wire_bytes=ranks[3][0].wire_bytes + 1), *ranks[3][1:-1]]
        lines = report(counted=ranks, **parallel).differences()
        assert lines == list(volume_lines(report(counted=ranks, **parallel)))[-len(lines) :]
        assert len(lines) == 4
        assert all(line.startswith("rank 3: ") for line in lines)
        assert sum("wire_bytes is" in line for line in lines) == 2


class TestSummary:
    def test_kinds(self):
        assert [site_kind(site) for site in ("layers.12.mlp", "layers.0.context", "boundary.3", "candidates")] == [
            "mlp",
            "context",
            "boundary",
            "candidates",
        ]

    @pytest.mark.parametrize("hf_config", [LLAMA_13B, MIXTURE])
    def test_busiest_rank_and_sum(self, hf_config):
        parallel = {"tensor_parallel_size": 4, "pipeline_parallel_size": 2, "gather_logits": True}
        layout = report(hf_config, **parallel).layout
        ranks = predict_request(layout, REQUEST, 1024)
        summary = summarize(ranks, layout.callers)
        for row in summary:
            of_ranks = [
                [
                    r
                    for r in rows
                    if (r.phase, r.operation, site_kind(r.site), r.algorithm)
                    == (row.phase, row.operation, row.kind, row.algorithm)
                ]
                for rows in ranks
            ]
            assert row.wire_bytes == max(sum(r.wire_bytes for r in rows) for rows in of_ranks)
            assert row.payload_bytes == max(sum(r.payload_bytes for r in rows) for rows in of_ranks)
            assert row.total_wire_bytes == sum(r.wire_bytes for rows in of_ranks for r in rows)
        assert {row.kind for row in summary} == {"attention", "mlp", "boundary", "logits"}

    def test_a_call_counts_once_whoever_makes_it(self):
        """Eight KV heads on 16 ranks: eight pairs share contexts, and make three exchanges a layer and step."""
        layout = report(tensor_parallel_size=16, kv_sharding=KvSharding.SEQUENCE, pipeline_parallel_size=2).layout
        summary = summarize(predict_request(layout, REQUEST, 2048), layout.callers)
        counts = {(row.kind, row.operation): row.count for row in summary if row.phase is Phase.DECODE}
        assert counts == {
            ("context", "all_gather"): 2 * 8 * 32 * 127,
            ("context", "reduce_scatter"): 8 * 32 * 127,
            ("attention", "all_reduce"): 32 * 127,
            ("mlp", "all_reduce"): 32 * 127,
            ("boundary", "send"): 16 * 127,
            ("candidates", "all_gather"): 127,
        }


class TestPlot:
    def test_file(self, volume, tmp_path):
        code, _, err = volume("--tp", 2, "--plot", tmp_path / "volume.svg")
        assert (code, err) == (0, "")
        assert "<svg" in (tmp_path / "volume.svg").read_text()

    def test_curves(self):
        """V_pp falls to half by sending one tensor, and a layout that does not fit has no point."""
        by_ranks = curves_by_ranks(report(MIXTURE))
        assert {label: list(points) for label, points in by_ranks.items()} == {
            "TP, literal": [2, 4],
            "TP, Headrace": [2, 4],
            "PP, literal": [2, 4],
            "PP, Headrace": [2, 4],
        }
        both = report(tensor_parallel_size=2, pipeline_parallel_size=2)
        assert curves_by_length(both, 4)["TP 2 x PP 2, Headrace"][128] == both.accounts()[2].total_wire_bytes
        assert "TP 4 x PP 1, Headrace" not in curves_by_length(report(tensor_parallel_size=4), 4)
        by_length = curves_by_length(report(), 4)
        assert by_length["PP, literal"][128] == 12_533_760 == 2 * by_length["PP, Headrace"][128]
        assert by_length["TP, literal"][128] == 814_694_400 + 3 * 8_208_384


class TestDocs:
    """Figures in docs/communication.md are those of the formulas."""

    TEXT = (Path(__file__).resolve().parent.parent / "docs" / "communication.md").read_text(encoding="utf-8")

    def test_example(self, volume, capsys):
        example = re.search(r"```python\n(.*?)```", self.TEXT, re.DOTALL)
        exec(compile(example[1], "communication.md", "exec"), {})
        *_, wire, published = capsys.readouterr().out.splitlines()
        found = json.loads(volume("--model", "demo", "--tp", 2, "--json")[1])
        assert wire == f"{found['accounts']['headrace']['total_wire_bytes']['all']} bytes on all wires"
        assert published == f"{found['published']['v_tp']['total_bytes']} as published"

    NAMES: ClassVar = {"8B": "Llama-3.1-8B", "3B": "Llama-3.2-3B", "13B": "Llama-2-13B"}

    @pytest.mark.parametrize(("name", "t", "prefill", "decode", "shard", "total", "sums", "logits"), TENSOR_PARALLEL)
    def test_tensor_parallel(self, name, t, prefill, decode, shard, total, sums, logits):
        h = MODELS[name]["hidden_size"]
        calls = f"{prefill} of [128, {h}] | {decode} of [1, {h}] | 128 of [1, {shard}]"
        assert f"| {self.NAMES[name]} | {t} | {calls} | {total:,} | {sums:,} | {logits:,} |" in self.TEXT

    @pytest.mark.parametrize("name", MODELS)
    def test_pipeline_parallel(self, name):
        two, four = (total for of, _, total in PIPELINE_PARALLEL if of == name)
        h = MODELS[name]["hidden_size"]
        sends = f"2 of [128, {h}] and 254 of [1, {h}]"
        assert f"| {self.NAMES[name]} | {sends} | {two:,} | {four:,} |" in self.TEXT

    def test_direct_exchange_among_four(self):
        by_the_letter, _, mine = report(tensor_parallel_size=4).accounts()
        payload, wire = (
            f"{getattr(mine, name) / getattr(by_the_letter, name):.1%}".replace("%", " %")
            for name in ("total_payload_bytes", "total_wire_bytes")
        )
        assert f"its payload is {payload} of the literal engine's, its wire bytes {wire}" in " ".join(self.TEXT.split())


def test_no_torch(config_file):
    script = (
        "import sys; from headrace.cli.main import main\n"
        f"code = main(['volume', '--model', {str(config_file)!r}, '--tp', '2', '--pp', '2', '--json'])\n"
        "assert not {'torch', 'transformers', 'safetensors'} & set(sys.modules)\n"
        "sys.exit(code)"
    )
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True)
