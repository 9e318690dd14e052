"""Native ops on tensors that begin anywhere: inputs, outputs, weights and tables at odd element offsets, every
instruction set. What an op computes does not depend on where its operands lie, to the bit."""

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from headrace.config import Activation, KvCacheFormat, SoftmaxScheme, WeightFormat
from headrace.kernels import AttentionSpec, KvCacheSpec, SoftmaxSpec

cpu = pytest.importorskip("headrace.kernels.cpu", reason="the native module is not built", exc_type=ImportError)
native_linear = pytest.importorskip("headrace.kernels.cpu.linear")

DTYPES = (torch.float32, torch.bfloat16)
OFFSETS = (1, 3, 7)
"""Elements past an address that is a multiple of 64 bytes."""

each_target = pytest.mark.parametrize("target", cpu.supported_targets())
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
each_offset = pytest.mark.parametrize("offset", OFFSETS)


def moved(x: Tensor, offset: int) -> Tensor:
    """A contiguous copy that begins `offset` elements past a multiple of 64 bytes."""
    size = x.element_size()
    buffer = torch.empty(x.numel() + offset + 64 // size, dtype=x.dtype)
    start = -buffer.data_ptr() % 64 // size + offset
    out = buffer[start : start + x.numel()].view(x.shape)
    out.copy_(x)
    assert out.data_ptr() % 64 == offset * size % 64
    return out


class MovedStream(cpu.Stream):
    """Gives ops outputs that begin `offset` elements past a multiple of 64 bytes."""

    def __init__(self, offset: int) -> None:
        super().__init__()
        self._offset = offset

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        return moved(torch.zeros(shape, dtype=dtype), self._offset)


def assert_same_anywhere(offset: int, op: Callable[[cpu.Stream, Callable[[Tensor], Tensor]], Sequence[Tensor]]) -> None:
    """op(stream, place) gives the same bits whether `place` leaves tensors where they are or moves them."""
    expected = op(cpu.Stream(), torch.clone)
    actual = op(MovedStream(offset), lambda x: moved(x, offset))
    assert len(expected) == len(actual)
    for e, a in zip(expected, actual, strict=True):
        assert e.isfinite().all()
        assert torch.equal(e, a)


def x_dtype(weight_format: WeightFormat, dtype: torch.dtype) -> torch.dtype:
    return {WeightFormat.FLOAT32: torch.float32, WeightFormat.BFLOAT16: torch.bfloat16}.get(weight_format, dtype)


@each_target
@each_dtype
@each_offset
@pytest.mark.parametrize("weight_format", list(WeightFormat), ids=lambda f: f.value)
def test_linear_and_packing(target, weight_format, dtype, offset):
    dtype = x_dtype(weight_format, dtype)
    weight, bias = torch.randn(37, 101), torch.randn(37).to(dtype)

    def op(stream, place):
        builder = cpu.make_weight_builder(weight_format, 37, 101, target=target)
        builder.write(0, place(weight[:20].to(dtype)))
        builder.write(20, place(weight[20:].to(dtype)))
        packed, linear = builder.build(), cpu.Linear(target, stream)
        return [
            linear(place(x[:num_rows]), packed, place(bias), arm=arm)
            for num_rows in (1, 5, 19)
            for arm in (native_linear.Arm.GEMV, native_linear.Arm.FLAT_GEMM, native_linear.Arm.GEMM)
        ]

    x = torch.randn(19, 101).to(dtype)
    assert_same_anywhere(offset, op)


@each_target
@each_dtype
@each_offset
def test_rows_of_x_with_an_odd_stride(target, dtype, offset):
    """Columns cut from a fused output: every row is aligned differently."""
    builder = cpu.make_weight_builder(WeightFormat.INT8, 37, 96, target=target)
    builder.write(0, torch.randn(37, 96))
    packed, x = builder.build(), torch.randn(19, 103).to(dtype)
    linear = cpu.Linear(target, cpu.Stream())
    assert torch.equal(linear(x[:, offset : offset + 96], packed), linear(x[:, offset : offset + 96].clone(), packed))


@each_target
@each_offset
@pytest.mark.parametrize("weight_format", [WeightFormat.INT8, WeightFormat.INT4], ids=lambda f: f.value)
def test_quantized_rows(target, weight_format, offset):
    rows = torch.randn(5, 101)

    def op(stream, place):
        qweight, scales = cpu.quantize_rows(place(rows), weight_format, target=target)
        builder = cpu.make_weight_builder(weight_format, 5, 101, target=target)
        builder.write_quantized(0, place(qweight), place(scales))
        return [qweight, scales, cpu.Linear(target, stream)(torch.ones(1, 101), builder.build())]

    assert_same_anywhere(offset, op)


@each_dtype
@each_offset
@pytest.mark.parametrize("weight_format", list(WeightFormat), ids=lambda f: f.value)
def test_embedding(weight_format, dtype, offset):
    builder = cpu.make_weight_builder(weight_format, 37, 101)
    builder.write(0, torch.randn(37, 101))
    packed, ids = builder.build(), torch.tensor([36, 0, 17])
    assert_same_anywhere(
        offset, lambda stream, place: [cpu.Embedding(stream)(place(ids), packed, dtype=dtype, scale=1.5)]
    )


@each_target
@each_dtype
@each_offset
def test_norms(target, dtype, offset):
    x, residual = torch.randn(2, 5, 101).to(dtype)
    weight, bias = torch.randn(2, 101).to(dtype)

    def op(stream, place):
        norm, total, added = cpu.Norm(target, stream), place(residual), place(residual)
        norm.add_(added, place(x))
        return [
            norm.rms_norm(place(x), place(weight), eps=1e-6),
            norm.rms_norm(place(x), place(weight), eps=1e-6, residual=total),
            norm.layer_norm(place(x), place(weight), place(bias), eps=1e-6),
            total,
            added,
        ]

    assert_same_anywhere(offset, op)


@each_target
@each_dtype
@each_offset
@pytest.mark.parametrize("kind", list(Activation), ids=lambda kind: kind.value)
def test_activations(target, dtype, offset, kind):
    x = torch.randn(5, 2 * 101).to(dtype)

    def op(stream, place):
        activate = cpu.Activate(target, stream)
        return [activate.activation(place(x), kind), activate.gated_activation(place(x), kind)]

    assert_same_anywhere(offset, op)


@each_target
@each_offset
def test_sampling(target, offset):
    logits = torch.randn(3, 1001)

    def op(stream, place):
        sampling = cpu.Sampling(target, stream)
        rows = place(logits)
        return [*sampling.argmax(rows), sampling.log_sum_exp(rows), sampling.top_k(rows, 7)]

    assert_same_anywhere(offset, op)


@each_target
@each_dtype
@each_offset
@pytest.mark.parametrize("cache_format", list(KvCacheFormat), ids=lambda f: f.value)
def test_rotary_and_attention(target, dtype, offset, cache_format):
    """Two sequences of 9 and 34 tokens, computed whole; heads of a size that fills no vector."""
    lens, head_dim = (9, 34), 40
    num_tokens = sum(lens)
    query, key, value = (torch.randn(num_tokens, n, head_dim).to(dtype) for n in (4, 2, 2))
    positions = torch.cat([torch.arange(n) for n in lens])
    tables = torch.tensor([[4, -1, -1], [1, 5, 2]], dtype=torch.int32)
    slots = torch.cat([tables[i].long()[torch.arange(n) // 16] * 16 + torch.arange(n) % 16 for i, n in enumerate(lens)])
    inv_freq = torch.logspace(0, -3, head_dim // 2)
    cache_spec = KvCacheSpec(cache_format=cache_format, num_blocks=6, block_size=16, num_kv_heads=2, head_dim=head_dim)

    def op(stream, place):
        cache, rotated = cpu.make_kv_cache(cache_spec), place(query)
        cos, sin = cpu.RotaryTable(stream)(place(positions), place(inv_freq), 1.0)
        store = cpu.RotaryStoreKv(target, stream)
        store(rotated, place(key), place(value), cache, place(slots), (place(cos), place(sin)))
        attention = cpu.Attention(target, stream)
        outs = [
            attention(
                place(rotated),
                cache,
                place(tables),
                place(torch.tensor(lens, dtype=torch.int32)),
                place(torch.tensor([0, 9, num_tokens], dtype=torch.int32)),
                AttentionSpec(softmax_scale=head_dim**-0.5, softmax=SoftmaxSpec(scheme=scheme)),
            )
            for scheme in SoftmaxScheme
        ]
        return [cos, sin, rotated, *cpu.read_kv(cache, place(slots)), *outs]

    assert_same_anywhere(offset, op)
