"""Native ops past offsets of 2^31 and 2^32 bytes, where 32-bit arithmetic on an address or an index would wrap around.

What is large here is address space: pages that nobody has written to take no memory. Rows around the places where an
offset would wrap are compared with a small tensor that holds nothing else.
"""

import pytest
import torch
from torch import Tensor

from headrace.config import KvCacheFormat, WeightFormat
from headrace.kernels import AttentionSpec, KvCacheSpec, SoftmaxSpec
from headrace.machine import available_memory_bytes

cpu = pytest.importorskip("headrace.kernels.cpu", reason="the native module is not built", exc_type=ImportError)
native_linear = pytest.importorskip("headrace.kernels.cpu.linear")

TARGETS = cpu.supported_targets()
each_target = pytest.mark.parametrize("target", TARGETS)

NUM_INPUTS = 4096
WRAPS = (2**31, 2**32)
"""Bytes after which a signed and an unsigned 32-bit offset begin again."""


def need_memory(num_bytes: int) -> None:
    """Systems may refuse to promise more than they have, though most of it is never written to."""
    available = available_memory_bytes()
    if available < num_bytes:
        pytest.skip(f"needs {num_bytes / 2**30:.1f} GiB of memory, {available / 2**30:.1f} GiB are available")


def some_rows(num_rows: int, row_bytes: int) -> list[int]:
    """The first rows, those on both sides of each wrap, and the last ones."""
    around = [place // row_bytes + d for place in WRAPS for d in (-17, -1, 0, 1, 16)]
    return sorted({row for row in (0, 1, *around, num_rows - 17, num_rows - 2, num_rows - 1) if row < num_rows})


class Rows:
    """A weight with entries in a few rows, and the small one that has these rows alone."""

    def __init__(self, weight_format: WeightFormat, num_bytes: int, bytes_per_entry: int) -> None:
        self.num_rows = num_bytes // (NUM_INPUTS * bytes_per_entry) + 33
        self.rows = some_rows(self.num_rows, NUM_INPUTS * bytes_per_entry)
        self.values = torch.randn(len(self.rows), NUM_INPUTS, generator=torch.Generator().manual_seed(0)).bfloat16()
        large = cpu.make_weight_builder(weight_format, self.num_rows, NUM_INPUTS)
        small = cpu.make_weight_builder(weight_format, len(self.rows), NUM_INPUTS)
        small.write(0, self.values)
        for row, values in zip(self.rows, self.values, strict=True):
            large.write(row, values[None])
        self.large, self.small = large.build(), small.build()


def bfloat16_rows() -> Rows:
    need_memory(WRAPS[0] * 2)
    return Rows(WeightFormat.BFLOAT16, WRAPS[0], 2)


def assert_linear(case: Rows, target: str, x: Tensor, arm: native_linear.Arm) -> None:
    linear = cpu.Linear(target, cpu.Stream())
    out = linear(x, case.large, out_dtype=torch.float32, arm=arm)[:, case.rows]
    assert torch.equal(out, linear(x, case.small, out_dtype=torch.float32, arm=arm))
    expected = x.double() @ case.values.double().T
    assert ((out.double() - expected).norm() / expected.norm()).item() < 0.03


@each_target
def test_bfloat16_linear(target):
    case = bfloat16_rows()
    assert case.large.num_bytes > WRAPS[0]
    assert_linear(case, target, torch.randn(1, NUM_INPUTS).bfloat16(), native_linear.Arm.GEMV)


@pytest.mark.parametrize("arm", [native_linear.Arm.FLAT_GEMM, native_linear.Arm.GEMM], ids=lambda arm: arm.name.lower())
def test_int8_linear(arm):
    """Past 2^32 bytes, where indices of entries wrap too."""
    need_memory(WRAPS[1] + WRAPS[0])
    case = Rows(WeightFormat.INT8, WRAPS[1], 1)
    assert case.large.num_bytes > WRAPS[1]
    assert_linear(case, cpu.best_target(), torch.randn(2, NUM_INPUTS), arm)


def test_embedding():
    need_memory(WRAPS[1] + WRAPS[0])
    case = Rows(WeightFormat.INT8, WRAPS[1], 1)
    embed = cpu.Embedding(cpu.Stream())
    out = embed(torch.tensor(case.rows), case.large, dtype=torch.float32)
    assert torch.equal(out, embed(torch.arange(len(case.rows)), case.small, dtype=torch.float32))
    assert ((out - case.values).norm() / case.values.norm()).item() < 0.01


@pytest.mark.parametrize("cache_format", list(KvCacheFormat), ids=lambda f: f.value)
def test_kv_cache(cache_format):
    """One sequence in blocks around the wraps of a large cache, and in the blocks of a small one."""
    num_kv_heads, head_dim, block_size = 4, 64, 16

    def make(num_blocks: int):
        spec = KvCacheSpec(
            cache_format=cache_format,
            num_blocks=num_blocks,
            block_size=block_size,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
        )
        return cpu.make_kv_cache(spec), cpu.kv_cache_num_bytes(spec)

    _, block_bytes = make(1)
    num_blocks = WRAPS[1] // block_bytes + 20
    need_memory(num_blocks * block_bytes)
    (large, num_bytes), blocks = make(num_blocks), some_rows(num_blocks, block_bytes)
    assert num_bytes > WRAPS[1]
    small, _ = make(len(blocks))
    context_len = len(blocks) * block_size - 3
    positions = torch.arange(context_len)
    key, value = torch.randn(2, context_len, num_kv_heads, head_dim)
    query = torch.randn(1, 2 * num_kv_heads, head_dim)
    outs, read = [], []
    for cache, table in ((large, blocks), (small, range(len(blocks)))):
        block_table = torch.tensor([list(table)], dtype=torch.int32)
        slots = block_table[0].long()[positions // block_size] * block_size + positions % block_size
        no_queries = key.new_empty(context_len, 0, head_dim)
        cpu.RotaryStoreKv(cpu.best_target(), cpu.Stream())(no_queries, key, value, cache, slots, None)
        read.append(torch.stack(cpu.read_kv(cache, slots)))
        outs.append(
            [
                cpu.Attention(target, cpu.Stream())(
                    query,
                    cache,
                    block_table,
                    torch.tensor([context_len], dtype=torch.int32),
                    torch.tensor([0, 1], dtype=torch.int32),
                    AttentionSpec(softmax_scale=head_dim**-0.5, softmax=SoftmaxSpec()),
                )
                for target in TARGETS
            ]
        )
    torch.testing.assert_close(read[0], torch.stack([key, value]), rtol=2**-7, atol=0.03)
    assert torch.equal(read[0], read[1])
    assert all(torch.equal(in_large, in_small) for in_large, in_small in zip(*outs, strict=True))


def far_rows(num_columns: int) -> Tensor:
    """Three rows, 2^31 bytes from one to the next."""
    need_memory(2 * WRAPS[1])
    stride = WRAPS[0] // 4
    rows = torch.empty(2 * stride + num_columns).as_strided((3, num_columns), (stride, 1))
    return rows.copy_(torch.randn(3, num_columns))


@each_target
def test_rows_far_apart(target):
    x = far_rows(1000)
    near, stream = x.clone(), cpu.Stream()
    builder = cpu.make_weight_builder(WeightFormat.INT4, 20, 1000, target=target)
    builder.write(0, torch.randn(20, 1000))
    weight, linear, norm, sampling = (
        builder.build(),
        *(op(target, stream) for op in (cpu.Linear, cpu.Norm, cpu.Sampling)),
    )
    for arm in (native_linear.Arm.GEMV, native_linear.Arm.FLAT_GEMM, native_linear.Arm.GEMM):
        assert torch.equal(linear(x, weight, arm=arm), linear(near, weight, arm=arm))
    assert torch.equal(norm.rms_norm(x, torch.ones(1000), eps=1e-6), norm.rms_norm(near, torch.ones(1000), eps=1e-6))
    assert all(torch.equal(far, close) for far, close in zip(sampling.argmax(x), sampling.argmax(near), strict=True))
    assert torch.equal(sampling.top_k(x, 5), sampling.top_k(near, 5))
    far_builder = cpu.make_weight_builder(WeightFormat.INT8, 3, 1000, target=target)
    far_builder.write(0, x)
    near_builder = cpu.make_weight_builder(WeightFormat.INT8, 3, 1000, target=target)
    near_builder.write(0, near)
    ones = torch.ones(1, 1000)
    assert torch.equal(linear(ones, far_builder.build()), linear(ones, near_builder.build()))
