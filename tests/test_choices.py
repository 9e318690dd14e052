"""What is said of choices, against what the choosers do."""

from dataclasses import replace

import pytest
from checkpoints import HAS_NATIVE
from hypothesis import given
from hypothesis import strategies as st

from headrace import LLM
from headrace.config import SoftmaxScheme
from headrace.demo_model import demo_model_path
from headrace.engine.choices import dataflow_choice, layout_choice, softmax_choice
from headrace.engine.load import LoadedModel
from headrace.kernels import SoftmaxSpec
from headrace.kernels.tuning import Inflections, LinearArm, TunedShape


@pytest.fixture(scope="module")
def model() -> LoadedModel:
    return LLM(str(demo_model_path()), num_threads=1, dataflow="default", max_model_len=128).engine.model


points = st.integers(1, 40)


@given(points, points)
def test_ranges_are_what_every_number_of_rows_gets(one, other):
    inflections = Inflections(flat_gemm_from=min(one, other), gemm_from=max(one, other))
    ranges = inflections.ranges()
    for num_rows in range(1, 50):
        [arm] = [arm for arm, first, last in ranges if first <= num_rows and (last is None or num_rows <= last)]
        assert arm is inflections.arm(num_rows)


@pytest.mark.parametrize(
    ("flat_gemm_from", "gemm_from", "text"),
    [
        (2, 96, "GEMV below M = 2, flat GEMM below M = 96, then GEMM"),
        (1, 8, "flat GEMM below M = 8, then GEMM"),
        (2, 2, "GEMV below M = 2, then GEMM"),
        (1, 1, "GEMM for every M"),
    ],
)
def test_people_are_told_of_what_is_used(flat_gemm_from, gemm_from, text):
    assert str(Inflections(flat_gemm_from=flat_gemm_from, gemm_from=gemm_from)) == text


@pytest.mark.skipif(not HAS_NATIVE, reason="plain torch has one implementation")
class TestDataflow:
    def test_every_shape_of_the_model_with_its_layers(self, model):
        config = model.config
        found = dataflow_choice(model)
        assert found["source"] == "default"
        by_name = {shape["name"]: (shape["n"], shape["k"]) for shape in found["shapes"]}
        hidden, inner = config.hidden_size, config.mlp.intermediate_size
        assert by_name["gate_proj + up_proj"] == (2 * inner, hidden)
        assert by_name["down_proj"] == (hidden, inner)
        assert {shape["format"] for shape in found["shapes"]} == {
            s.weight_format.value for s in model.linear_weights.by_shape
        }
        named = {name for shape in found["shapes"] for name in shape["name"].split(", ")}
        assert named == {"q_proj + k_proj + v_proj", "o_proj", "gate_proj + up_proj", "down_proj", "embed_tokens"}
        for shape in found["shapes"]:
            assert [arm["arm"] for arm in shape["arms"]] == ["gemv", "flat_gemm", "gemm"]
            assert shape["arms"][0]["from_rows"] == 1
            assert shape["arms"][-1]["to_rows"] is None

    def test_grounds(self, model):
        dataflow = model.kernels.dataflow
        first = next(iter(model.linear_weights.by_shape))
        try:
            points = Inflections(flat_gemm_from=3, gemm_from=3)
            dataflow.tuned[first] = TunedShape(inflections=points, measured_on="2026-01-01")
            found = dataflow_choice(model)
            assert found["source"] == "partly measured"
            assert [shape["source"] for shape in found["shapes"]].count("measured") == 1
            assert found["shapes"][0]["arms"] == [
                {"from_rows": 1, "to_rows": 2, "arm": "gemv"},
                {"from_rows": 3, "to_rows": None, "arm": "gemm"},
            ]
            dataflow.force(LinearArm.FLAT_GEMM)
            found = dataflow_choice(model)
            assert found["source"] == "forced"
            assert found["shapes"][0]["arms"] == [{"from_rows": 1, "to_rows": None, "arm": "flat_gemm"}]
        finally:
            dataflow.force(None)
            dataflow.tuned.clear()

    def test_one_implementation_is_no_choice(self, model):
        alone = replace(model, kernels=replace(model.kernels, dataflow=None))
        assert dataflow_choice(alone) == {"source": "none", "shapes": []}


def test_schemes_are_counted_by_layer(model):
    assert softmax_choice(model) == {"synchronized": model.config.num_hidden_layers}
    first, *others = model.softmax.layers
    layers = (SoftmaxSpec(scheme=SoftmaxScheme.LAZY), first, *others)
    assert softmax_choice(replace(model, softmax=replace(model.softmax, layers=layers))) == {
        "lazy": 1,
        "synchronized": model.config.num_hidden_layers,
    }


def test_layout(model):
    assert layout_choice(model) == {
        "tensor_parallel_size": 1,
        "pipeline_parallel_size": 1,
        "transport": None,
        "device": "cpu",
        "num_threads": 1,
    }
