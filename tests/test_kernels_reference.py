"""The reference ops against oracles that share nothing with them: float64 numpy, torch's and transformers' own ops."""

import importlib
import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from plain_quantizer import plain_dequantize, plain_quantize, unpack
from torch import Tensor
from transformers.activations import ACT2FN
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm, eager_attention_forward
from transformers.models.glm.modeling_glm import apply_rotary_pos_emb as glm_rotary
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb as llama_rotary

from headrace.config import Activation, KvCacheFormat, SoftmaxScheme, WeightFormat
from headrace.errors import KernelError, ShapeError
from headrace.kernels import AttentionSpec, DenseKvCache, KvCacheSpec, QuantizedWeight, SoftmaxSpec, Weight, reference

GQA = {1: (4, 4), 4: (8, 2), 8: (8, 1), 16: (16, 1)}
"""Query heads to a KV head: (num_heads, num_kv_heads)."""

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
NAN = float("nan")


def assert_close(actual: Tensor, expected: np.ndarray, dtype=torch.float32) -> None:
    assert actual.dtype == dtype
    scale = max(1.0, float(np.abs(expected).max(initial=0)))
    np.testing.assert_allclose(actual.double().numpy(), expected, rtol=0, atol=TOLERANCE[dtype] * scale)


# Attention


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Sequences over a paged cache in which every slot that no query sees holds NaN; keys and values as lists too."""

    query: Tensor
    kv_cache: DenseKvCache
    block_tables: Tensor
    context_lens: Tensor
    cu_seqlens_q: Tensor
    keys: list[Tensor]
    values: list[Tensor]

    def attention(self, spec: AttentionSpec) -> Tensor:
        return reference.attention(
            self.query, self.kv_cache, self.block_tables, self.context_lens, self.cu_seqlens_q, spec
        )


def dense_cache(num_blocks, block_size, num_kv_heads, head_dim, dtype) -> DenseKvCache:
    """A cache of NaN."""
    spec = KvCacheSpec(
        cache_format=KvCacheFormat(str(dtype).removeprefix("torch.")),
        num_blocks=num_blocks,
        block_size=block_size,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
    )
    cache = reference.make_kv_cache(spec)
    assert isinstance(cache, DenseKvCache)
    assert cache.data.nbytes == reference.kv_cache_num_bytes(spec)
    cache.data.fill_(NAN)
    return cache


def make_batch(
    contexts, query_lens, *, heads=(4, 4), head_dim=16, block_size=16, window=None, dtype=torch.float32
) -> Batch:
    num_heads, num_kv_heads = heads
    blocks = [-(-context // block_size) for context in contexts]
    ids = torch.randperm(sum(blocks) + 2).tolist()
    cache = dense_cache(len(ids), block_size, num_kv_heads, head_dim, dtype)
    tables = torch.full((len(contexts), max(blocks) + 2), -1, dtype=torch.int32)
    keys, values = [], []
    for i, (context, num_blocks, num_queries) in enumerate(zip(contexts, blocks, query_lens, strict=True)):
        tables[i, :num_blocks] = torch.tensor([ids.pop() for _ in range(num_blocks)])
        key, value = (torch.randn(context, num_kv_heads, head_dim).to(dtype) for _ in range(2))
        first_seen = 0 if window is None else max(0, context - num_queries - window + 1)
        for position in range(first_seen, context):
            block = int(tables[i, position // block_size])
            cache.data[0, block, position % block_size] = key[position]
            cache.data[1, block, position % block_size] = value[position]
        keys.append(key)
        values.append(value)
    return Batch(
        query=torch.randn(sum(query_lens), num_heads, head_dim).to(dtype),
        kv_cache=cache,
        block_tables=tables,
        context_lens=torch.tensor(contexts, dtype=torch.int32),
        cu_seqlens_q=torch.tensor([0, *np.cumsum(query_lens)], dtype=torch.int32),
        keys=keys,
        values=values,
    )


def plain_attention(batch: Batch, spec: AttentionSpec) -> np.ndarray:
    """One query of one head at a time, in float64."""
    query = batch.query.double().numpy()
    out = np.empty_like(query)
    group = query.shape[1] // batch.kv_cache.spec.num_kv_heads
    bounds = batch.cu_seqlens_q.tolist()
    for i, context in enumerate(batch.context_lens.tolist()):
        key, value = batch.keys[i].double().numpy(), batch.values[i].double().numpy()
        for row in range(bounds[i], bounds[i + 1]):
            position = context - (bounds[i + 1] - row)
            first = 0 if spec.sliding_window is None else max(0, position - spec.sliding_window + 1)
            for head in range(query.shape[1]):
                seen = slice(first, position + 1)
                out[row, head] = plain_row(query[row, head], key[seen, head // group], value[seen, head // group], spec)
    return out


def plain_row(query: np.ndarray, key: np.ndarray, value: np.ndarray, spec: AttentionSpec) -> np.ndarray:
    scores = key @ query * spec.softmax_scale
    if spec.logit_soft_cap is not None:
        scores = spec.logit_soft_cap * np.tanh(scores / spec.logit_soft_cap)
    weights = np.exp(scores - scores.max())
    return weights @ value / weights.sum()


CONTEXTS = (17, 1, 40, 16)
QUERY_LENS = {
    "decode": (1, 1, 1, 1),
    "chunk": (5, 1, 13, 3),
    "whole": CONTEXTS,
    "mixed": (1, 1, 40, 7),
}


@pytest.mark.parametrize("query_lens", QUERY_LENS.values(), ids=QUERY_LENS.keys())
@pytest.mark.parametrize("soft_cap", [None, 2.0], ids=["no-cap", "cap"])
@pytest.mark.parametrize("window", [None, 1, 6, 100], ids=lambda w: f"window-{w}")
@pytest.mark.parametrize("block_size", [1, 3, 16], ids=lambda b: f"block-{b}")
@pytest.mark.parametrize("ratio", GQA, ids=lambda r: f"gqa-{r}")
def test_attention(ratio, block_size, window, soft_cap, query_lens):
    batch = make_batch(CONTEXTS, query_lens, heads=GQA[ratio], block_size=block_size, window=window)
    spec = AttentionSpec(softmax_scale=0.7, sliding_window=window, logit_soft_cap=soft_cap)
    assert_close(batch.attention(spec), plain_attention(batch, spec))


@pytest.mark.parametrize("head_dim", [1, 2, 7, 33, 80, 129])
def test_attention_of_odd_head_dims(head_dim):
    batch = make_batch((9, 30), (9, 1), heads=(6, 2), head_dim=head_dim, block_size=4)
    spec = AttentionSpec(softmax_scale=head_dim**-0.5)
    assert_close(batch.attention(spec), plain_attention(batch, spec))


@pytest.mark.parametrize(
    "max_elements", [1, 4 * 40, 3 * 4 * 40, 7 * 4 * 40 + 1], ids=["1", "1-row", "3-rows", "7-rows"]
)
@pytest.mark.parametrize("window", [None, 1, 6], ids=lambda w: f"window-{w}")
def test_attention_in_tiles_equals_attention_at_once(monkeypatch, max_elements, window):
    batch = make_batch((40, 22), (40, 11), window=window)
    spec = AttentionSpec(softmax_scale=0.5, sliding_window=window)
    at_once = batch.attention(spec)
    module = importlib.import_module("headrace.kernels.reference.attention")
    calls = []
    attend = module._attend
    monkeypatch.setattr(module, "_MAX_SCORE_ELEMENTS", max_elements)
    monkeypatch.setattr(module, "_attend", lambda *args: calls.append(len(args[0])) or attend(*args))
    torch.testing.assert_close(batch.attention(spec), at_once, rtol=1e-5, atol=1e-6)
    assert len(calls) > 2
    assert sum(calls) == 51


def test_attention_in_bfloat16_accumulates_in_float32():
    batch = make_batch((300, 7), (1, 7), heads=(8, 2), dtype=torch.bfloat16)
    spec = AttentionSpec(softmax_scale=0.25)
    assert_close(batch.attention(spec), plain_attention(batch, spec), torch.bfloat16)


@pytest.mark.parametrize("size", [1e4, -1e4])
def test_attention_survives_huge_scores(size):
    batch = make_batch((20,), (20,))
    batch.query.mul_(size)
    spec = AttentionSpec(softmax_scale=1.0)
    # A score of 4e4 is known to 0.004 in float32, so its weight is known to as much.
    np.testing.assert_allclose(batch.attention(spec).numpy(), plain_attention(batch, spec), rtol=0, atol=0.02)


def test_attention_equals_that_of_torch():
    batch = make_batch((37,), (37,), heads=(8, 2), head_dim=24)
    expected = F.scaled_dot_product_attention(
        batch.query.transpose(0, 1)[None],
        batch.keys[0].transpose(0, 1)[None],
        batch.values[0].transpose(0, 1)[None],
        is_causal=True,
        scale=0.3,
        enable_gqa=True,
    )[0].transpose(0, 1)
    assert_close(batch.attention(AttentionSpec(softmax_scale=0.3)), expected.double().numpy())


def test_soft_cap_equals_that_of_transformers():
    batch = make_batch((21,), (21,), heads=(4, 2))
    module = torch.nn.Module()
    module.num_key_value_groups = 2
    mask = torch.full((21, 21), -math.inf).triu(1)[None, None]
    query, key, value = (x.transpose(0, 1)[None] for x in (batch.query, batch.keys[0], batch.values[0]))
    expected, _ = eager_attention_forward(module.eval(), query, key, value, mask, dropout=0.0, scaling=0.9, softcap=1.5)
    spec = AttentionSpec(softmax_scale=0.9, logit_soft_cap=1.5)
    assert_close(batch.attention(spec), expected[0].double().numpy())


def test_a_place_that_holds_no_sequence_gets_zeros_and_reads_nothing():
    batch = make_batch((5, 9), (1, 1), heads=(4, 2), block_size=4)
    spec = AttentionSpec(softmax_scale=0.7)
    expected = plain_attention(batch, spec)
    batch.context_lens[1] = 0
    batch.block_tables[1] = -(10**6)
    out = batch.attention(spec)
    assert_close(out[:1], expected[:1])
    assert not out[1].any()


def test_attention_refuses_heads_that_do_not_share_evenly():
    batch = make_batch((3,), (1,), heads=(6, 4))
    with pytest.raises(ShapeError, match="6 query heads cannot share 4 KV heads"):
        batch.attention(AttentionSpec(softmax_scale=1.0))


@pytest.mark.parametrize("scheme", [SoftmaxScheme.ASYNCHRONIZED, SoftmaxScheme.LAZY], ids=lambda s: s.value)
def test_attention_has_one_softmax_scheme_and_refuses_the_others(scheme):
    with pytest.raises(KernelError, match=f"no {scheme.value} softmax"):
        make_batch((3,), (1,)).attention(AttentionSpec(softmax_scale=1.0, softmax=SoftmaxSpec(scheme=scheme)))


def tokens(num_tokens, *num_heads, head_dim=5, dtype=torch.float32):
    return [torch.randn(num_tokens, count, head_dim).to(dtype) for count in num_heads]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_store_kv_writes_its_slots_and_no_other(dtype):
    cache = dense_cache(3, 4, 2, 5, dtype)
    query, key, value = tokens(4, 6, 2, 2, dtype=dtype)
    before = query.clone()
    slots = [7, 0, 11, 4]
    reference.rotary_store_kv_(query, key, value, cache, torch.tensor(slots), None)
    assert torch.equal(query, before)
    for slot in range(12):
        for half, given in enumerate((key, value)):
            stored = cache.data[half, slot // 4, slot % 4]
            if slot in slots:
                assert torch.equal(stored, given[slots.index(slot)])
            else:
                assert stored.isnan().all()


@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "pairs"])
def test_store_kv_rotates_queries_in_place_and_keys_on_their_way(interleaved):
    cache = dense_cache(1, 4, 2, 6, torch.float32)
    query, key, value = tokens(3, 4, 2, 2, head_dim=6)
    angles = torch.rand(3, 2) * 50
    expected_query, expected_key = (
        plain_rotary(x.double().numpy(), angles.double().numpy(), interleaved) for x in (query, key)
    )
    cos_sin = angles.cos(), angles.sin()
    reference.rotary_store_kv_(query, key, value, cache, torch.arange(3), cos_sin, interleaved=interleaved)
    stored_key, stored_value = reference.read_kv(cache, torch.arange(3))
    assert_close(query, expected_query)
    assert_close(stored_key, expected_key)
    assert torch.equal(stored_value, value)


def test_int8_cache_is_off_by_half_a_step_of_each_heads_largest_entry():
    spec = KvCacheSpec(cache_format=KvCacheFormat.INT8, num_blocks=2, block_size=4, num_kv_heads=2, head_dim=40)
    cache = reference.make_kv_cache(spec)
    query, key, value = tokens(8, 2, 2, 2, head_dim=40)
    key *= torch.logspace(-3, 3, 8)[:, None, None]
    reference.rotary_store_kv_(query, key, value, cache, torch.arange(8), None)
    for stored, given in zip(reference.read_kv(cache, torch.arange(8)), (key, value), strict=True):
        step = given.abs().amax(-1, keepdim=True) / 127
        assert ((stored - given).abs() <= 0.501 * step).all()
    assert reference.kv_cache_num_bytes(spec) == 2 * 8 * 2 * (40 + 4)


@pytest.mark.parametrize("bad", [NAN, math.inf], ids=str)
def test_int8_cache_keeps_what_is_not_finite_as_nan(bad):
    """Of the token and head alone, and of its key where only the value is bad: whoever sees it shall know."""
    spec = KvCacheSpec(cache_format=KvCacheFormat.INT8, num_blocks=1, block_size=4, num_kv_heads=2, head_dim=5)
    cache = reference.make_kv_cache(spec)
    query, key, value = tokens(4, 2, 2, 2)
    value[2, 1, 3] = bad
    reference.rotary_store_kv_(query, key, value, cache, torch.arange(4), None)
    for stored in reference.read_kv(cache, torch.arange(4)):
        assert stored[2, 1].isnan().all()
        assert stored.isfinite().sum() == 7 * 5


# Rotary


def plain_rotary(x: np.ndarray, angles: np.ndarray, interleaved: bool) -> np.ndarray:
    """Multiplication of complex numbers."""
    out, half = x.copy(), angles.shape[1]
    first = slice(0, 2 * half, 2) if interleaved else slice(0, half)
    second = slice(1, 2 * half, 2) if interleaved else slice(half, 2 * half)
    rotated = (x[..., first] + 1j * x[..., second]) * np.exp(1j * angles)[:, None]
    out[..., first], out[..., second] = rotated.real, rotated.imag
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("head_dim", "half"), [(2, 1), (16, 8), (16, 4), (33, 5), (80, 40)])
@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "pairs"])
def test_rotary(interleaved, head_dim, half, dtype):
    """On a view into a fused projection, as attention calls it; what lies beside it stays."""
    fused = torch.randn(5, 7, head_dim).to(dtype)
    before, x = fused.clone(), fused[:, 2:5]
    angles = torch.rand(5, half) * 100
    reference.rotary_(x, angles.cos(), angles.sin(), interleaved=interleaved)
    expected = plain_rotary(before[:, 2:5].double().numpy(), angles.double().numpy(), interleaved)
    assert_close(x, expected, dtype)
    assert torch.equal(fused[:, :2], before[:, :2])
    assert torch.equal(fused[:, 5:], before[:, 5:])
    assert torch.equal(x[..., 2 * half :], before[:, 2:5, 2 * half :])


@pytest.mark.parametrize(("interleaved", "apply"), [(False, llama_rotary), (True, glm_rotary)], ids=["llama", "glm"])
def test_rotary_equals_that_of_transformers(interleaved, apply):
    x, angles = torch.randn(6, 3, 16), torch.rand(6, 8) * 50
    wide = torch.cat((angles, angles), dim=-1)[None]
    expected, _ = apply(x.transpose(0, 1)[None], x.transpose(0, 1)[None], wide.cos(), wide.sin())
    reference.rotary_(x, angles.cos(), angles.sin(), interleaved=interleaved)
    torch.testing.assert_close(x, expected[0].transpose(0, 1), rtol=1e-6, atol=1e-6)


# Norms and activations

SIZES = (1, 2, 7, 64, 257)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("unit_offset", [False, True], ids=["weight", "one-plus-weight"])
@pytest.mark.parametrize("size", SIZES)
def test_rms_norm(size, unit_offset, dtype):
    x, weight = torch.randn(5, 3, size).to(dtype), torch.randn(size).to(dtype)
    wide = x.double().numpy()
    scale = weight.double().numpy() + unit_offset
    expected = wide / np.sqrt((wide**2).mean(-1, keepdims=True) + 1e-5) * scale
    assert_close(reference.rms_norm(x, weight, eps=1e-5, unit_offset=unit_offset), expected, dtype)


@pytest.mark.parametrize("value", [0.0, 1e-20, 1e15])
def test_rms_norm_of_constant_rows(value):
    out = reference.rms_norm(torch.full((2, 8), value), torch.ones(8), eps=1e-6)
    assert_close(out, np.full((2, 8), value / math.sqrt(value**2 + 1e-6)))


def test_rms_norms_equal_those_of_transformers():
    x, weight = torch.randn(4, 48), torch.randn(48)
    llama, gemma = LlamaRMSNorm(48, 1e-6), Gemma2RMSNorm(48, 1e-6)
    llama.weight.data, gemma.weight.data = weight.clone(), weight.clone()
    with torch.inference_mode():
        torch.testing.assert_close(reference.rms_norm(x, weight, eps=1e-6), llama(x))
        torch.testing.assert_close(reference.rms_norm(x, weight, eps=1e-6, unit_offset=True), gemma(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_layer_norm(size, dtype):
    x, weight, bias = (torch.randn(*shape).to(dtype) for shape in ((5, size), (size,), (size,)))
    wide = x.double().numpy()
    centered = wide - wide.mean(-1, keepdims=True)
    expected = centered / np.sqrt((centered**2).mean(-1, keepdims=True) + 1e-5)
    expected = expected * weight.double().numpy() + bias.double().numpy()
    assert_close(reference.layer_norm(x, weight, bias, eps=1e-5), expected, dtype)


def plain_activation(x: float, activation: Activation) -> float:
    match activation:
        case Activation.SILU:
            return x / (1 + math.exp(-x))
        case Activation.GELU:
            return 0.5 * x * (1 + math.erf(x / math.sqrt(2)))
        case Activation.GELU_TANH:
            return 0.5 * x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
        case Activation.RELU:
            return max(x, 0.0)


HF_ACTIVATIONS = {
    Activation.SILU: "silu",
    Activation.GELU: "gelu",
    Activation.GELU_TANH: "gelu_pytorch_tanh",
    Activation.RELU: "relu",
}


@pytest.mark.parametrize("activation", Activation, ids=lambda a: a.value)
def test_activation(activation):
    x = torch.cat((torch.linspace(-20, 20, 401), torch.tensor([-0.0, 1e-30])))[None]
    expected = np.array([[plain_activation(v, activation) for v in x[0].tolist()]])
    assert_close(reference.activation(x, activation), expected)
    torch.testing.assert_close(reference.activation(x, activation), ACT2FN[HF_ACTIVATIONS[activation]](x))


@pytest.mark.parametrize("activation", Activation, ids=lambda a: a.value)
@pytest.mark.parametrize("size", [1, 5, 48])
def test_gated_activation_is_gate_first(activation, size):
    x = torch.randn(3, 2 * size)
    gate = [[plain_activation(v, activation) for v in row] for row in x[:, :size].tolist()]
    assert_close(reference.gated_activation(x, activation), np.array(gate) * x[:, size:].double().numpy())


# Weights


def build(rows: Tensor, weight_format: WeightFormat, block: int = 3) -> Weight:
    """A weight filled in blocks of rows that do not divide it."""
    builder = reference.make_weight_builder(weight_format, *rows.shape)
    for start in range(0, len(rows), block):
        builder.write(start, rows[start : start + block])
    return builder.build()


def plain_weight(rows: Tensor, weight_format: WeightFormat) -> np.ndarray:
    match weight_format:
        case WeightFormat.FLOAT32:
            return rows.double().numpy()
        case WeightFormat.BFLOAT16:
            return rows.to(torch.bfloat16).double().numpy()
        case WeightFormat.INT8 | WeightFormat.INT4:
            return plain_dequantize(*plain_quantize(rows.numpy(), weight_format))


COLUMNS = (1, 2, 31, 32, 33, 64, 95, 100)
FORMATS = pytest.mark.parametrize("weight_format", WeightFormat, ids=lambda f: f.value)


@FORMATS
@pytest.mark.parametrize("has_bias", [False, True], ids=["no-bias", "bias"])
@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("num_tokens", [1, 5])
def test_linear(num_tokens, columns, has_bias, weight_format):
    dtype = torch.bfloat16 if weight_format is WeightFormat.BFLOAT16 else torch.float32
    x, rows = torch.randn(num_tokens, columns).to(dtype), torch.randn(7, columns)
    bias = torch.randn(7).to(dtype) if has_bias else None
    expected = x.double().numpy() @ plain_weight(rows, weight_format).T
    if bias is not None:
        expected = expected + bias.double().numpy()
    assert_close(reference.linear(x, build(rows, weight_format), bias), expected, dtype)


@FORMATS
@pytest.mark.parametrize("columns", COLUMNS)
def test_embedding(columns, weight_format):
    rows, ids = torch.randn(9, columns), [8, 0, 3, 3]
    out = reference.embedding(torch.tensor(ids), build(rows, weight_format), dtype=torch.float32)
    np.testing.assert_allclose(out.double().numpy(), plain_weight(rows, weight_format)[ids], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("weight_format", [WeightFormat.INT8, WeightFormat.INT4], ids=lambda f: f.value)
@pytest.mark.parametrize("columns", COLUMNS)
def test_quantized_weight_lies_in_memory_as_stated(columns, weight_format):
    rows = torch.randn(5, columns)
    weight = build(rows, weight_format)
    assert isinstance(weight, QuantizedWeight)
    q, scales = plain_quantize(rows.numpy(), weight_format)
    np.testing.assert_array_equal(weight.scales.numpy(), scales)
    np.testing.assert_array_equal(unpack(weight), q)
    assert weight.shape == (5, columns)
    assert weight.num_bytes == weight.qweight.nbytes + weight.scales.nbytes


@FORMATS
def test_block_size_of_loading_does_not_show_in_the_weight(weight_format):
    rows, x = torch.randn(10, 70), torch.randn(2, 70)
    x = x.to(torch.bfloat16) if weight_format is WeightFormat.BFLOAT16 else x
    outs = [reference.linear(x, build(rows, weight_format, block)) for block in (1, 4, 10)]
    assert torch.equal(outs[0], outs[1])
    assert torch.equal(outs[0], outs[2])


def test_dense_weight_takes_no_quantized_rows():
    builder = reference.make_weight_builder(WeightFormat.FLOAT32, 2, 32)
    with pytest.raises(NotImplementedError):
        builder.write_quantized(0, torch.zeros(2, 32, dtype=torch.int8), torch.zeros(2, 1))


@FORMATS
def test_linear_refuses_an_input_of_another_width(weight_format):
    with pytest.raises(ShapeError, match="input has 31 columns, the weight takes 32"):
        reference.linear(torch.randn(2, 31), build(torch.randn(3, 32), weight_format))


# Router


@pytest.mark.parametrize("renormalize", [False, True], ids=["raw", "renormalized"])
@pytest.mark.parametrize(("num_experts", "k"), [(1, 1), (4, 2), (8, 8), (60, 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_router(num_experts, k, renormalize, dtype):
    # Distinct values: which of two equal experts is taken is nobody's contract.
    logits = torch.stack([torch.randperm(num_experts) for _ in range(6)]).to(dtype) / 8
    weights, experts = reference.route_experts(logits, k, renormalize=renormalize)
    wide = logits.double().numpy()
    probabilities = np.exp(wide) / np.exp(wide).sum(-1, keepdims=True)
    order = np.argsort(-probabilities, axis=-1)[:, :k]
    expected = np.take_along_axis(probabilities, order, axis=-1)
    if renormalize:
        expected = expected / expected.sum(-1, keepdims=True)
    np.testing.assert_array_equal(experts.numpy(), order)
    assert_close(weights, expected)


def test_router_survives_huge_logits():
    weights, experts = reference.route_experts(torch.tensor([[1e30, -1e30, 0.0]]), 2, renormalize=True)
    assert weights.tolist() == [[1.0, 0.0]]
    assert experts[0, 0] == 0
