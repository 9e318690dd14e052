"""Everything lies where the kernels' device is: shown without a GPU by devices that refuse to be mixed with the CPU.

Tensors on torch's meta device have shapes and no content, and no op takes them together with others.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints import BY_NAME, load_folder, random_tokens

from headrace import LLM, SamplingParams
from headrace.config import KvCacheFormat, NormPlacement, ParallelConfig, WeightFormat
from headrace.engine.packed_arrays import PackedArrays
from headrace.engine.rows import Row, batch_specs, build_forward_batch
from headrace.kernels import KernelChoice, KvCacheSpec, resolve_kernels
from headrace.models import loading
from headrace.models.boundary import Boundary
from headrace.models.upload import StagedUpload
from headrace.parallel.group import OneRankGroup

META = torch.device("meta")
SETTINGS = {
    "llama-biases": {},
    "llama-tied": {"quantize": "int4"},
    "gemma2": {"kv_cache_dtype": "int8"},
    "qwen3-moe": {"quantize": "int8"},
    "opt-350m": {},
}


@pytest.fixture(scope="module", params=SETTINGS)
def name(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def folder(name, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models") / name
    BY_NAME[name].write(folder)
    return folder


def test_steps_make_no_tensor_elsewhere_than_their_inputs_lie(name, folder, monkeypatch) -> None:
    """Whatever is made without saying where goes to the meta device, and cannot meet the rest."""
    monkeypatch.setenv("HEADRACE_KERNELS", "reference")
    prompts = [{"prompt_token_ids": random_tokens(n, seed=n)} for n in (40, 5, 17)]
    params = [
        SamplingParams(temperature=0, max_tokens=6, prompt_logprobs=1),
        SamplingParams(temperature=1, seed=1, max_tokens=9, logprobs=2, repetition_penalty=1.1),
        SamplingParams(temperature=0, max_tokens=9),
    ]
    settings = {"dtype": "float32", "num_blocks": 12, "max_num_batched_tokens": 32, "max_num_seqs": 4}

    def make() -> LLM:
        return LLM(str(folder), **settings, **SETTINGS[name])

    def tokens(llm: LLM) -> list[list[int]]:
        return [output.outputs[0].token_ids for output in llm.generate(prompts, params)]

    expected, llm = tokens(make()), make()
    with META:
        assert tokens(llm) == expected


def test_weights_are_loaded_to_the_device(folder, monkeypatch) -> None:
    monkeypatch.setattr(loading, "make_upload", lambda device: lambda block: block.to(device))
    decoder = load_folder(folder, kernels=resolve_kernels(KernelChoice.REFERENCE, device=META))
    for parameter in decoder.parameters():
        tensor = parameter.weight.data if parameter.is_matrix else parameter.vector
        assert tensor.device == META
    assert all(table.inv_freq.device == META for table in decoder._rotary.values())


@pytest.mark.parametrize("cache_format", KvCacheFormat)
def test_caches_are_made_on_the_device(cache_format) -> None:
    spec = KvCacheSpec(cache_format=cache_format, num_blocks=2, block_size=4, num_kv_heads=1, head_dim=8)
    cache = resolve_kernels(KernelChoice.REFERENCE, device=META).make_kv_cache(spec)
    assert {x.device for x in vars(cache).values() if isinstance(x, torch.Tensor)} == {META}


def test_a_stage_receives_on_the_device() -> None:
    class Second(OneRankGroup):
        rank = 1

    kernels = resolve_kernels(KernelChoice.REFERENCE, device=META)
    boundary = Boundary(
        ParallelConfig(pipeline_parallel_size=2),
        kernels,
        OneRankGroup(),
        Second(),
        hidden_size=4,
        dtype=torch.float32,
        max_num_tokens=3,
        placement=NormPlacement.PRE,
    )
    assert boundary._received.device == META


def test_quantized_weights_are_made_on_the_device() -> None:
    kernels = resolve_kernels(KernelChoice.REFERENCE, device=META)
    for weight_format in (WeightFormat.INT8, WeightFormat.INT4):
        weight = kernels.make_weight_builder(weight_format, 3, 40).build()
        assert {weight.qweight.device, weight.scales.device} == {META}


class Event:
    """Of a device whose copies arrive when they are waited for, and not before."""

    log: list[str] = []  # noqa: RUF012

    def record(self) -> None:
        self.log.append("record")

    def synchronize(self) -> None:
        self.log.append("synchronize")


def test_a_buffer_is_written_again_only_after_it_has_left() -> None:
    Event.log = []
    upload = StagedUpload(torch.device("cpu"), pin_memory=False, make_event=Event)
    blocks = [torch.randn(rows, 6)[:, 1:4] for rows in (3, 2, 5, 1, 4)]
    for block in blocks:
        found = upload(block)
        assert torch.equal(found, block)
        assert found.is_contiguous()
    assert Event.log == ["synchronize", "record"] * 5
    assert len({buffer.data_ptr() for buffer in upload._buffers}) == 2


def test_a_block_keeps_its_type() -> None:
    upload = StagedUpload(torch.device("cpu"), pin_memory=False, make_event=Event)
    for dtype in (torch.bfloat16, torch.float64, torch.int8):
        block = torch.arange(12).to(dtype).view(3, 4)
        assert torch.equal(upload(block), block)
        assert upload(block).dtype is dtype


def test_a_batch_is_made_of_its_rows() -> None:
    rows = [Row([3, 4], 5, np.array([7, 1], np.int32)), Row([9], 0, np.array([2], np.int32))]
    batch = build_forward_batch(rows, 4)
    assert batch.input_ids.tolist() == [3, 4, 9]
    assert batch.positions.tolist() == [5, 6, 0]
    assert batch.slot_mapping.tolist() == [5, 6, 8]
    assert batch.block_tables.tolist() == [[7, 1], [2, -1]]
    assert batch.context_lens.tolist() == [7, 1]
    assert batch.cu_seqlens_q.tolist() == [0, 2, 3]
    assert batch.owned_blocks is None


def test_arrays_that_are_sent_hold_what_the_host_wrote() -> None:
    specs = batch_specs(num_tokens=5, num_seqs=3, width=7, is_shared=True)
    arrays = PackedArrays(specs, torch.device("cpu"), is_staged=True)
    for count, array in enumerate(arrays.host.values(), start=1):
        array[...] = np.arange(count, count + array.size).reshape(array.shape)
    arrays.send()
    for name, array in arrays.host.items():
        np.testing.assert_array_equal(arrays.device[name].numpy(), array)
        array[...] = -9
    # Not yet sent, but for what comes before the tables and two of their rows.
    arrays.send(until="block_tables", num_rows=2)
    assert (arrays.device["block_tables"][:2] == -9).all()
    assert not (arrays.device["block_tables"][2:] == -9).any()
    assert all((part == -9).all() for name, part in arrays.device.items() if name != "block_tables")
