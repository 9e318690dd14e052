"""Sequences in a paged cache for the tests of Triton's attention, and what attention gives in float64."""

import itertools
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from triton_device import DEVICE

from headrace.config import KvCacheFormat, SoftmaxScheme
from headrace.kernels import AttentionSpec, KvCacheSpec, SoftmaxSpec
from headrace.kernels.kv_cache import GpuKvCache
from headrace.kernels.triton import kv_cache as gpu

TOLERANCE = {torch.float32: 2e-5, torch.float16: 2.0**-8, torch.bfloat16: 2.0**-6}
"""Of the largest value, by the type of queries and outputs."""


@dataclass(frozen=True, kw_only=True)
class Problem:
    """Blocks lie in no order, and what no token was written to is NaN.

    query: [num_tokens, num_heads, head_dim], those of the sequences end to end.
    """

    cache: GpuKvCache
    query: Tensor
    tables: Tensor
    context_lens: list[int]
    new_lens: list[int]

    @property
    def bounds(self) -> list[int]:
        return [0, *itertools.accumulate(self.new_lens)]

    def slots(self, seq: int) -> Tensor:
        size = self.cache.spec.block_size
        positions = torch.arange(self.context_lens[seq], device=DEVICE)
        return self.tables[seq].long()[positions // size] * size + positions % size

    def only(self, seq: int) -> "Problem":
        begin, end = self.bounds[seq : seq + 2]
        return replace(
            self,
            query=self.query[begin:end],
            tables=self.tables[seq : seq + 1],
            context_lens=self.context_lens[seq : seq + 1],
            new_lens=self.new_lens[seq : seq + 1],
        )

    def arguments(self) -> tuple[Tensor, GpuKvCache, Tensor, Tensor, Tensor]:
        lens, bounds = (torch.tensor(x, dtype=torch.int32, device=DEVICE) for x in (self.context_lens, self.bounds))
        return self.query, self.cache, self.tables, lens, bounds


def make_problem(
    lens: tuple[tuple[int, int], ...],
    *,
    dtype: torch.dtype = torch.float32,
    cache_format: KvCacheFormat = KvCacheFormat.FLOAT32,
    num_kv_heads: int = 2,
    group: int = 4,
    head_dim: int = 64,
    block_size: int = 16,
    query_scale: float = 1.0,
) -> Problem:
    """lens: tokens of each context, and how many of them are new."""
    widths = [-(-context // block_size) for context, _ in lens]
    spec = KvCacheSpec(
        cache_format=cache_format,
        num_blocks=sum(widths) + 3,
        block_size=block_size,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
    )
    cache = gpu.make_kv_cache(spec, device=DEVICE)
    cache.scales.fill_(torch.nan)
    cache.data.fill_(127 if cache_format is KvCacheFormat.INT8 else torch.nan)
    # Block 0, which addresses that are not read point to, holds nobody's tokens.
    order = torch.randperm(spec.num_blocks - 1, dtype=torch.int32).to(DEVICE) + 1
    tables = torch.full((len(lens), max(widths) + 2), -1, dtype=torch.int32, device=DEVICE)
    for table, ids in zip(tables, order[: sum(widths)].split(widths), strict=True):
        table[: len(ids)] = ids
    query = torch.randn(sum(new for _, new in lens), num_kv_heads * group, head_dim) * query_scale
    problem = Problem(
        cache=cache,
        query=query.to(DEVICE, dtype),
        tables=tables,
        context_lens=[context for context, _ in lens],
        new_lens=[new for _, new in lens],
    )
    for seq in range(len(lens)):
        slots = problem.slots(seq)
        write(cache, slots, *torch.randn(2, len(slots), num_kv_heads, head_dim).to(DEVICE))
    return problem


def write(cache: GpuKvCache, slots: Tensor, key: Tensor, value: Tensor) -> None:
    """Into the layout that `GpuKvCache` documents, without the kernel that does this for models."""
    blocks, offsets = slots // cache.spec.block_size, slots % cache.spec.block_size
    for kind, x in enumerate((key, value)):
        if cache.spec.cache_format is KvCacheFormat.INT8:
            scales = x.abs().amax(-1) / 127
            cache.scales[kind].transpose(1, 2)[blocks, offsets] = scales
            x = (x / scales[..., None]).round()
        cache.data[kind].transpose(1, 2)[blocks, offsets] = x.to(cache.data.dtype)


def make_spec(scheme: SoftmaxScheme = SoftmaxScheme.SYNCHRONIZED, head_dim: int = 64, **settings) -> AttentionSpec:
    softmax = SoftmaxSpec(scheme=scheme, **settings.pop("softmax", {}))
    return AttentionSpec(softmax_scale=head_dim**-0.5, softmax=softmax, **settings)


def exact(problem: Problem, spec: AttentionSpec) -> Tensor:
    """Brute force in float64, over the keys and values as the cache holds them."""
    out = torch.empty(problem.query.shape, dtype=torch.float64, device=DEVICE)
    group = problem.query.shape[1] // problem.cache.spec.num_kv_heads
    for seq, (context, new) in enumerate(zip(problem.context_lens, problem.new_lens, strict=True)):
        keys, values = (
            x.double().repeat_interleave(group, dim=1) for x in gpu.read_kv(problem.cache, problem.slots(seq))
        )
        rows = slice(*problem.bounds[seq : seq + 2])
        position = torch.arange(context - new, context, device=DEVICE)[:, None]
        key_position = torch.arange(context, device=DEVICE)[None]
        hidden = key_position > position
        if spec.sliding_window is not None:
            hidden |= key_position <= position - spec.sliding_window
        logits = torch.einsum("nhd,phd->hnp", problem.query[rows].double(), keys) * spec.softmax_scale
        if spec.logit_soft_cap is not None:
            logits = spec.logit_soft_cap * torch.tanh(logits / spec.logit_soft_cap)
        weights = torch.softmax(logits.masked_fill(hidden, -torch.inf), dim=-1)
        out[rows] = torch.einsum("hnp,phd->nhd", weights, values)
    return out


def assert_right(actual: Tensor, problem: Problem, spec: AttentionSpec) -> None:
    expected = exact(problem, spec)
    assert actual.dtype == problem.query.dtype
    assert actual.isfinite().all()
    largest = max(1.0, float(expected.abs().max()))
    assert (actual.double() - expected).abs().max() <= TOLERANCE[actual.dtype] * largest
